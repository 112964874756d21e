"""HOST:PORT as people write it. Loopback unless another host is named."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import NamedTuple

LOOPBACK = "127.0.0.1"


class Address(NamedTuple):
    """A TCP address to listen on or to call. `port` 0 lets the system choose when listening."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_address(text: str) -> Address:
    """HOST:PORT, [IPV6]:PORT, :PORT or PORT; without a host it is 127.0.0.1. Raises ValueError with the
    reason.
    """
    host, colon, port_text = text.strip().rpartition(":")
    if not colon:
        host = ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is no IPv6 address") from None
    elif ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address goes into brackets, as in [::1]:50051")
    elif not all(c.isascii() and (c.isalnum() or c in ".-_") for c in host):
        raise ValueError(f"{text!r}: {host!r} is no host name")
    if not (
        port_text.isascii() and port_text.isdigit() and int(port_text[:6]) <= 65535 and len(port_text) <= 5
    ):
        raise ValueError(f"{text!r}: expected HOST:PORT with a port from 0 to 65535")
    return Address(host or LOOPBACK, int(port_text))


def why_not_bound(address: Address) -> str | None:
    """The system's reason why an address cannot be listened on, or None when it can.

    A name may stand for addresses that this machine does not have, `localhost` without IPv6 for one: one that
    it has is enough.
    """
    missing: str | None = None
    is_bound = False
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, target in found:
            try:
                with socket.socket(family, kind, protocol) as probe:
                    # As the library does: an address whose connections are still closing may be taken again.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(target)
                    probe.listen(1)
                is_bound = True
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error.strerror
    except OSError as error:
        return error.strerror or str(error)
    return None if is_bound else missing
