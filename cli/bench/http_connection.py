"""Connections for HTTP: raw bytes over asyncio, kept open between requests. Knows no API."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from cli.bench.http_parser import AnswerParser, HttpBroken
from cli.bench.settings import ServerSettings, SettingsError
from cli.bench.transport import now

CONNECT_S = 10.0
IDLE_CONNECTIONS = 4096
MAX_FILES = 65_536

OnBody = Callable[[AnswerParser, bytes, float], bool]
"""Takes a piece of a body and the time at which it came; True: enough, break off."""


@dataclass(frozen=True)
class Origin:
    """Where requests go, out of a base address."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None
    tls_name: str | None

    @property
    def authority(self) -> str:
        """As of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def origin_of(server: ServerSettings) -> Origin:
    """Read the address and the certificates. Raises SettingsError."""
    text = server.url or ""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"--url {text}: {error}") from None
    if "@" in parts.netloc:
        # The address is written into results; and the key goes into a header. Not repeated here.
        raise SettingsError("--url with a user or a password: give a key with --api-key")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SettingsError(f"--url must be as http://HOST:PORT or https://HOST/v1; not {text!r}")
    path = parts.path.rstrip("/")
    if not path.endswith("/v1"):
        path += "/v1"
    tls = _context(server) if parts.scheme == "https" else None
    if tls is None and server.tls_ca is not None:
        raise SettingsError("--tls-ca needs an https address in --url")
    return Origin(parts.hostname, port or (443 if tls else 80), path, tls, server.tls_name)


def _context(server: ServerSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(server.tls_ca) if server.tls_ca else None)
        if server.tls_cert is not None:
            context.load_cert_chain(server.tls_cert, server.tls_key, password=lambda: b"-")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise SettingsError(f"{server.tls_ca or server.tls_cert}: cannot be used: {why}") from None
    return context


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_open = False
        self._parser = AnswerParser()
        self._on_body: OnBody | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        self.transport = transport  # type: ignore[assignment]
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """The time is taken here, before anything is parsed."""
        at = now()
        if self._on_body is None or self._done is None or self._done.done():
            self.close()  # bytes that nobody asked for
            return
        try:
            for piece in self._parser.feed(data):
                if self._on_body(self._parser, piece, at):
                    self.close()
                    self._finish(None)
                    return
        except Exception as error:
            self.close()
            self._finish(error)
            return
        if self._parser.is_done:
            self._finish(None)

    def connection_lost(self, error: Exception | None) -> None:
        """The end of it; of an answer too, when that has no other."""
        self.is_open = False
        try:
            self._parser.ended()
        except HttpBroken as broken:
            self._finish(error or broken)
        else:
            self._finish(None)

    async def exchange(self, request: bytes, on_body: OnBody) -> AnswerParser:
        """Send a request and read its answer. Raises HttpBroken, OSError and what `on_body` raises."""
        if self.transport is None or not self.is_open:
            raise ConnectionResetError("the connection has ended")
        self.resume()  # a slow reader may have had it before
        self._parser, self._on_body = AnswerParser(), on_body
        self._done = asyncio.get_running_loop().create_future()
        try:
            self.transport.write(request)
            await self._done
        except BaseException:
            self.close()  # what is left of the answer would be the next request's
            raise
        finally:
            self._on_body = self._done = None
        if not self._parser.is_done or not self._parser.is_keeping_alive:
            self.close()
        return self._parser

    def pause(self) -> None:
        """Stop reading; what comes stays with the system, and then with the server."""
        if self.transport is not None and self.is_open:
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.transport is not None and self.is_open:
            self.transport.resume_reading()

    def close(self) -> None:
        """End it at once: the server sees that nobody reads."""
        self.is_open = False
        if self.transport is not None:
            self.transport.abort()

    def _finish(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


def allow_connections() -> None:
    """As many as the system lets a process have: usually it is content with far fewer."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ImportError, OSError, ValueError):
        return  # then a connection too many fails, and says so


class Pool:
    """Connections that wait for their next request; the one used last is used first."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.num_opened = 0
        self._idle: deque[Connection] = deque(maxlen=IDLE_CONNECTIONS)

    async def take(self) -> tuple[Connection, bool]:
        """A connection, and whether it was used before. Raises OSError."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, True
        origin = self.origin
        name = (origin.tls_name or origin.host) if origin.tls else None
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, origin.host, origin.port, ssl=origin.tls, server_hostname=name
                )
        except TimeoutError:
            # Not to be taken for an answer that took too long.
            raise ConnectionError(f"no connection within {CONNECT_S:g} s") from None
        self.num_opened += 1
        return connection, False

    def give(self, connection: Connection) -> None:
        """Done with it."""
        if connection.is_open:
            self._idle.append(connection)

    def close(self) -> None:
        """Close what waits."""
        while self._idle:
            self._idle.pop().close()
