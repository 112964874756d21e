"""The gateway's configuration. `load` merges flags that may be repeated; all else is weft.config's."""

# ruff: noqa: RUF009 - `option` makes a dataclass field

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.gateway.admission.flags import AdmissionFlags, check_admission_flags
from services.gateway.routing.flags import RoutingFlags, check_routing_flags, merge_repeated, parse_engines
from weft.config import ConfigError, load_config, option
from weft.limits import TextLimitFlags
from weft.logs import LEVELS
from weft.rpc.address import Address, parse_address
from weft.rpc.guard import EngineTlsFlags, ServerFlags, check_server_flags, engine_tls_of

PROG = "python -m services.gateway serve"
ENV_PREFIX = "WEFT_GATEWAY_"
MAX_ORPHAN_TTL_S = 86_400
MAX_SESSION_TTL_S = 10 * 366 * 86_400
# What engines take.
MAX_RETAIN_S = 86_400


@dataclass(frozen=True)
class GatewayConfig(AdmissionFlags, ServerFlags, EngineTlsFlags, TextLimitFlags, RoutingFlags):
    """Flags of `serve`; WEFT_GATEWAY_* variables stand in for them."""

    listen: Address = option(
        parse_address("127.0.0.1:50052"),
        "address to listen on for gRPC",
        parse=parse_address,
        metavar="HOST:PORT",
    )
    engine: tuple[str, ...] = option(
        ("127.0.0.1:50051",),
        "an engine, a name whose every address is one, or a file that lists them; may be given several times",
        parse=parse_engines,
        metavar="HOST:PORT|dns:NAME:PORT|file:PATH",
    )
    artifacts: Path | None = option(
        None, "artifact root: tokenizers and templates are read below it", metavar="DIR"
    )
    tokenizer: Path | None = option(
        None, "directory with tokenizer.json, for engines of plain checkpoints", metavar="DIR"
    )
    http: Address | None = option(
        None, "address to listen on for OpenAI-compatible HTTP", parse=parse_address, metavar="HOST:PORT"
    )
    http_header_seconds: float = option(10.0, "how long the headers of an HTTP request may take to come")
    http_body_seconds: float = option(10.0, "how long the body of an HTTP request may take to come")
    api_key_file: Path | None = option(
        None, "file of hashed API keys; without it everybody may call", metavar="FILE"
    )
    engine_api_key_file: Path | None = option(
        None, "file with the key that this gateway shows to engines", metavar="FILE"
    )
    max_waiting_requests: int = option(512, "requests that may wait for their first token")
    max_waiting_tokens: int = option(4 << 20, "prompt tokens that may wait")
    max_live_requests: int = option(4096, "requests in flight")
    slow_client_seconds: float = option(60.0, "how long a client may leave its output unread")
    orphan_ttl: float = option(30.0, "seconds for which a request is kept for a client that may come back")
    max_retained_requests: int = option(1024, "requests kept for clients that may come back")
    max_retained_bytes: int = option(256 << 20, "about the memory that those may take")
    sessions: Path | None = option(
        None, "file that sessions are kept in; without it they do not outlive the process", metavar="FILE"
    )
    session_ttl: float = option(3600.0, "seconds for which a session is kept after its last turn")
    max_sessions: int = option(10_000, "sessions that are kept")
    max_sessions_per_key: int = option(1000, "sessions of one key")
    max_session_tokens: int = option(64 << 20, "tokens of all sessions together")
    session_retain_seconds: int = option(
        300, "for how long engines are asked to keep what they computed for a session"
    )
    engine_wait_seconds: float = option(15.0, "how long a request whose engine is lost waits for another")
    engine_dead_seconds: float = option(1.0, "silence after which a busy engine counts as dead")
    drain_seconds: float = option(30.0, "how long running requests may go on after a signal")
    max_coalesce: float = option(
        20.0, "for how long a busy gateway holds tokens of a stream to send them together; 0: never",
        metavar="MS",
    )  # fmt: skip
    processes: int = option(1, "processes that share the ports", metavar="N")
    process_http: Address | None = option(
        None,
        "with --processes, HTTP of each process alone, for its metrics: this port plus its index",
        parse=parse_address,
        metavar="HOST:PORT",
    )
    process_index: int | None = option(
        None, "which of them this is; --processes sets it for those it starts", metavar="I"
    )
    launcher_pid: int | None = option(
        None, "the process with which this one ends; --processes sets it for those it starts", metavar="PID"
    )
    log_level: str = option("info", "what is logged", choices=LEVELS)

    def __post_init__(self) -> None:
        check_server_flags(self)
        engine_tls_of(self)
        check_routing_flags(self)
        check_admission_flags(self)
        if (self.artifacts is None) == (self.tokenizer is None):
            raise ConfigError("--artifacts", "either it or --tokenizer must be given, and not both")
        if not self.engine:
            raise ConfigError("--engine", "at least one is needed")
        for name in ("max_waiting_requests", "max_waiting_tokens", "max_live_requests"):
            if getattr(self, name) < 1:
                raise ConfigError("--" + name.replace("_", "-"), "must be at least 1")
        for name in (
            "http_header_seconds",
            "http_body_seconds",
            "max_request_seconds",
            "slow_client_seconds",
            "engine_dead_seconds",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError("--" + name.replace("_", "-"), "must be above 0")
        for name in ("max_retained_requests", "max_retained_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError("--" + name.replace("_", "-"), "must not be negative")
        if not 0 <= self.orphan_ttl <= MAX_ORPHAN_TTL_S:
            raise ConfigError("--orphan-ttl", f"must be 0 to {MAX_ORPHAN_TTL_S}")
        check_sessions(self)
        if self.processes < 1:
            raise ConfigError("--processes", "must be at least 1")
        if self.process_index is not None and not 0 <= self.process_index < self.processes:
            raise ConfigError("--process-index", "must be at least 0 and below --processes")
        if self.process_http is not None and (self.processes == 1 or self.http is None):
            raise ConfigError("--process-http", "needs --http and --processes above 1")
        for name in ("admin", "process_http"):
            address = getattr(self, name)
            if self.processes > 1 and address is not None and address.port == 0:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(flag, "with several processes it needs a port; each takes the next one")
        for name in ("engine_wait_seconds", "drain_seconds", "max_coalesce"):
            if getattr(self, name) < 0:
                raise ConfigError("--" + name.replace("_", "-"), "must not be negative")


def check_sessions(config: GatewayConfig) -> None:
    """Raises ConfigError."""
    for name in ("max_sessions", "max_sessions_per_key", "max_session_tokens"):
        if getattr(config, name) < 1:
            raise ConfigError("--" + name.replace("_", "-"), "must be at least 1")
    if not 0 < config.session_ttl <= MAX_SESSION_TTL_S:
        raise ConfigError("--session-ttl", f"must be above 0, at most {MAX_SESSION_TTL_S}")
    if not 0 <= config.session_retain_seconds <= MAX_RETAIN_S:
        raise ConfigError("--session-retain-seconds", f"must be 0 to {MAX_RETAIN_S}")
    if config.sessions is not None and config.processes > 1:
        raise ConfigError("--sessions", "a gateway of several processes has no sessions")


def load(argv: Sequence[str]) -> GatewayConfig:
    """The configuration of one process. Exits with one line on a bad value."""
    return load_config(GatewayConfig, merge_repeated(argv), prog=PROG, env_prefix=ENV_PREFIX)
