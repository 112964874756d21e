"""What stands between a server and the network: keys, certificates, limits, the admin port; and their flags.

Every server with these flags builds a Guard from them and hands it to `weft.rpc.server.serve`. Knows no
service.
"""

# ruff: noqa: RUF009 - `option` makes a dataclass field

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.config import ConfigError, option
from weft.limits import RequestLimits, limits_of
from weft.rpc.address import Address, parse_address
from weft.rpc.auth import Authenticator
from weft.rpc.reload import WatchedFiles
from weft.rpc.tls import ChannelTls, ServerTls


@dataclass(frozen=True)
class ServerFlags:
    """Flags of every server, beside `api_key_file`."""

    tls_cert: Path | None = option(
        None, "certificate of this server, PEM; without it there is no TLS", metavar="FILE"
    )
    tls_key: Path | None = option(None, "key of the certificate, PEM", metavar="FILE")
    tls_client_ca: Path | None = option(
        None, "authority of client certificates, PEM; with it every client must show one", metavar="FILE"
    )
    tls_reload_seconds: float = option(
        10.0, "how often certificates and API keys are looked at for changes; SIGHUP does it at once"
    )
    admin: Address | None = option(
        None,
        "address of the admin port; one beyond loopback needs --admin-client-ca or --api-key-file",
        parse=parse_address,
        metavar="HOST:PORT",
    )
    admin_client_ca: Path | None = option(
        None,
        "authority of the certificates that the admin port asks for, PEM; unset means --tls-client-ca",
        metavar="FILE",
    )


def check_server_flags(config: Any) -> None:
    """What `__post_init__` of a configuration with ServerFlags calls. Raises ConfigError."""
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigError("--tls-cert", "needs --tls-key, and the other way round")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigError("--tls-client-ca", "needs --tls-cert and --tls-key")
    if config.tls_reload_seconds <= 0:
        raise ConfigError("--tls-reload-seconds", "must be above 0")
    if config.admin_client_ca is not None and config.tls_cert is None:
        raise ConfigError("--admin-client-ca", "needs --tls-cert and --tls-key")
    # --tls-client-ca is not enough: it would let every client stop the service.
    is_guarded = config.admin_client_ca is not None or config.api_key_file is not None
    if config.admin is not None and not config.admin.is_loopback and not is_guarded:
        raise ConfigError("--admin", "beyond loopback it needs --admin-client-ca or --api-key-file")
    limits_of(config)


@dataclass(frozen=True)
class EngineTlsFlags:
    """Flags of whoever calls engines."""

    engine_tls_ca: Path | None = option(
        None, "authority of the engines' certificates, PEM; without it engines are called without TLS",
        metavar="FILE",
    )  # fmt: skip
    engine_tls_cert: Path | None = option(None, "certificate that is shown to engines, PEM", metavar="FILE")
    engine_tls_key: Path | None = option(None, "key of that certificate, PEM", metavar="FILE")
    engine_tls_name: str | None = option(
        None, "name in the engines' certificates, where it is not that of their address", metavar="NAME"
    )


def engine_tls_of(config: Any) -> ChannelTls | None:
    """How engines are called. Raises ConfigError."""
    if (config.engine_tls_cert is None) != (config.engine_tls_key is None):
        raise ConfigError("--engine-tls-cert", "needs --engine-tls-key, and the other way round")
    if config.engine_tls_ca is None:
        if config.engine_tls_cert is not None or config.engine_tls_name is not None:
            raise ConfigError("--engine-tls-ca", "is needed by --engine-tls-cert and --engine-tls-name")
        return None
    return ChannelTls(
        config.engine_tls_ca, config.engine_tls_cert, config.engine_tls_key, config.engine_tls_name
    )


@dataclass(frozen=True)
class Guard:
    """One server's, made by `guard_of`; by default everybody may call, in plain text, within usual limits."""

    authenticator: Authenticator | None = None
    tls: ServerTls | None = None
    limits: RequestLimits | None = None
    admin: Address | None = None
    admin_tls: ServerTls | None = None
    reload_s: float = 10.0
    watched: tuple[WatchedFiles, ...] = field(default=())


def guard_of(config: Any) -> Guard:
    """The guard that a configuration with ServerFlags asks for. Raises KeyFileError or TlsError."""
    authenticator = Authenticator.from_file(config.api_key_file) if config.api_key_file else None
    tls = admin_tls = None
    watched = []
    if authenticator is not None:
        watched.append(WatchedFiles("API keys", (config.api_key_file,), authenticator.reload))
    if config.tls_cert is not None and config.tls_key is not None:
        tls = ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)
        watched.append(WatchedFiles("certificates", tls.paths, tls.reload))
        admin_tls = tls
        if config.admin is not None and config.admin_client_ca is not None:
            admin_tls = ServerTls(config.tls_cert, config.tls_key, config.admin_client_ca)
            watched.append(WatchedFiles("admin certificates", admin_tls.paths, admin_tls.reload))
    return Guard(
        authenticator=authenticator,
        tls=tls,
        limits=limits_of(config),
        admin=config.admin,
        admin_tls=admin_tls,
        reload_s=config.tls_reload_seconds,
        watched=tuple(watched),
    )
