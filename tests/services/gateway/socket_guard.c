/* Notes every address that a process connects or sends to, and every name that it looks up, in $SOCKET_GUARD_LOG. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void note(const char *what, const char *whom) {
  const char *path = getenv("SOCKET_GUARD_LOG");
  char line[512];
  int size = snprintf(line, sizeof line, "%s %s\n", what, whom ? whom : "-");
  int file = path ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
  if (file >= 0) {
    if (write(file, line, size < (int)sizeof line ? (size_t)size : sizeof line - 1) < 0) abort();
    close(file);
  }
}

static void note_address(const char *what, const struct sockaddr *address) {
  char host[INET6_ADDRSTRLEN] = "", text[256] = "other";
  if (address->sa_family == AF_INET) {
    const struct sockaddr_in *in = (const struct sockaddr_in *)address;
    inet_ntop(AF_INET, &in->sin_addr, host, sizeof host);
    snprintf(text, sizeof text, "%s:%d", host, ntohs(in->sin_port));
  } else if (address->sa_family == AF_INET6) {
    const struct sockaddr_in6 *in = (const struct sockaddr_in6 *)address;
    inet_ntop(AF_INET6, &in->sin6_addr, host, sizeof host);
    snprintf(text, sizeof text, "[%s]:%d", host, ntohs(in->sin6_port));
  } else if (address->sa_family == AF_UNIX) {
    snprintf(text, sizeof text, "unix:%s", ((const struct sockaddr_un *)address)->sun_path);
  } else if (address->sa_family == AF_UNSPEC) {
    return; /* takes a connection back */
  }
  note(what, text);
}

int connect(int fd, const struct sockaddr *address, socklen_t size) {
  int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
  note_address("connect", address);
  return real(fd, address, size);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t to_size) {
  ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
  if (to) note_address("send", to);
  return real(fd, data, size, flags, to, to_size);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
  ssize_t (*real)(int, const struct msghdr *, int) = dlsym(RTLD_NEXT, "sendmsg");
  if (message->msg_name) note_address("send", message->msg_name);
  return real(fd, message, flags);
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
  int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
      dlsym(RTLD_NEXT, "getaddrinfo");
  note("lookup", name);
  return real(name, service, hints, found);
}

struct hostent *gethostbyname(const char *name) {
  struct hostent *(*real)(const char *) = dlsym(RTLD_NEXT, "gethostbyname");
  note("lookup", name);
  return real(name);
}
