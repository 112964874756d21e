"""Certificates of servers and channels, read again when their files change. Knows no service.

A new connection gets the newest pair; a connection that stands keeps what it began with. A pair that does
not fit together is refused, and the one before goes on.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

MAX_PEM_BYTES = 1 << 20
# A session that could be taken up again would outlive the authority that let its client in.
_OPTIONS = ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION


class TlsError(ValueError):
    """Certificates that cannot be used. The message names the file, never what it holds."""


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise TlsError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_PEM_BYTES or b"-----BEGIN " not in data:
        raise TlsError(f"{path}: no PEM file")
    return data


class _NewestContext(ssl.SSLContext):
    """A context that makes each connection with another one: a context itself cannot forget an authority."""

    newest: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """A connection of the newest context."""
        return self.newest().wrap_bio(*args, **kwargs)


class ServerTls:
    """Certificate and key of a server, and the authority of its clients: with one, a client without a
    certificate of it is not let in. Raises TlsError.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self.cert, self.key, self.client_ca = cert, key, client_ca
        self.reload()

    @property
    def is_mutual(self) -> bool:
        """Whether clients must show a certificate."""
        return self.client_ca is not None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, as to be watched."""
        return (self.cert, self.key, *((self.client_ca,) if self.client_ca else ()))

    def reload(self) -> None:
        """Read the files. Raises TlsError, and then what was read before stays."""
        data = [_read(path) for path in self.paths]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= _OPTIONS
        context.num_tickets = 0
        try:
            # A key under a password would have the library ask for it on the terminal.
            context.load_cert_chain(self.cert, self.key, password=lambda: b"-")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise TlsError(f"{self.cert}, {self.key}: not a certificate and its key: {_why(error)}") from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, OSError, ValueError) as error:
                raise TlsError(f"{self.client_ca}: no authority: {_why(error)}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        if [_read(path) for path in self.paths] != data:
            raise TlsError(f"{self.cert}: changed while it was read")
        ca = data[2] if self.client_ca is not None else None
        self._context = context
        self._config = grpc.ssl_server_certificate_configuration([(data[1], data[0])], root_certificates=ca)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials for one port. Every handshake takes the newest files."""
        served = self._config

        def newest() -> Any:
            # Called by threads of the library, without the event loop.
            nonlocal served
            current = self._config
            if current is served:
                return None
            served = current
            return current

        return grpc.dynamic_ssl_server_credentials(
            served, newest, require_client_authentication=self.is_mutual
        )

    def context(self) -> ssl.SSLContext:
        """A context for servers that are no gRPC. Every handshake takes the newest files."""
        context = _NewestContext(ssl.PROTOCOL_TLS_SERVER)
        context.newest = lambda: self._context
        return context


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason) if reason else type(error).__name__


@dataclass(frozen=True)
class ChannelTls:
    """How a client knows its servers, by `ca`, and shows itself, by `cert` and `key`, if it must. `name` is
    the one in the servers' certificates, where it is not that of the address.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None
    name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files: a new channel has the newest. Raises TlsError."""
        if (self.cert is None) != (self.key is None):
            raise TlsError("a certificate needs its key, and a key its certificate")
        return grpc.ssl_channel_credentials(
            _read(self.ca),
            None if self.key is None else _read(self.key),
            None if self.cert is None else _read(self.cert),
        )

    def options(self) -> list[tuple[str, str]]:
        """Channel arguments beside the credentials."""
        return [("grpc.ssl_target_name_override", self.name)] if self.name else []
