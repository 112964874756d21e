"""How large what a client sends may be, and how long it may take: every number in one place, typed.

Gateway and engine build theirs from flags, and both hand it to the one validator. Formats (what an id is made
of) are no limits and stay with the validator. Knows no service.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weft.config import ConfigError, option, parse_size

_LOW, _HIGH = "weft.low", "weft.high"
MAX_MESSAGE_BYTES = (1 << 31) - 1


def _limit(
    default: float,
    help: str,
    *,
    low: float = 1,
    high: float = 1 << 30,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
) -> Any:
    declared = option(default, help, parse=parse, metavar=metavar)
    metadata = {**declared.metadata, _LOW: low, _HIGH: high}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def _size(default: int, help: str, *, low: int = 1, high: int = MAX_MESSAGE_BYTES) -> Any:
    return _limit(default, help, low=low, high=high, parse=parse_size, metavar="SIZE")


@dataclass(frozen=True)
class RequestLimits:
    """What one request, and one connection, may ask for at most. Raises ConfigError, naming the flag, for a
    value that makes no sense.
    """

    # Of a request's sampling, judged by gateway and engine alike.
    # An engine on a GPU has room for no more of them.
    max_logprobs: int = _limit(20, "log-probabilities a token", low=0, high=20)
    max_logit_bias: int = _limit(300, "entries of logit_bias", low=0, high=1 << 20)
    max_stop_token_ids: int = _limit(64, "entries of stop_token_ids", low=0, high=1 << 16)
    # Of what is text, which engines never see.
    max_n: int = _limit(8, "samples of a request", high=1024)
    max_text_bytes: int = _size(2 << 20, "text of a prompt, all messages of a chat together")
    max_messages: int = _limit(1024, "messages of a chat", high=1 << 20)
    max_stop_strings: int = _limit(16, "stop strings", low=0, high=4096)
    max_stop_bytes: int = _limit(256, "bytes of a stop string", high=1 << 16)
    max_request_seconds: float = _limit(1800.0, "the longest a request may take", low=1e-3, high=1e9)
    # Of the wire.
    max_message_bytes: int = _size(8 << 20, "one gRPC message", low=1 << 10)
    max_metadata_bytes: int = _size(16 << 10, "metadata of a gRPC call", low=1 << 10, high=1 << 20)
    max_streams_per_connection: int = _limit(1000, "gRPC calls at once on one connection; more wait")
    max_idle_seconds: float = _limit(
        600.0, "how long a gRPC connection without a call is kept", low=1, high=1e6
    )
    max_connections: int = _limit(4096, "connections at once, gRPC and HTTP each", high=1 << 20)
    max_body_bytes: int = _size(8 << 20, "body of an HTTP request", low=1 << 10)
    max_header_bytes: int = _size(32 << 10, "headers of an HTTP request", low=1 << 10, high=1 << 20)
    max_prompts: int = _limit(64, "prompts of an HTTP request", high=1 << 16)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low, high = field.metadata[_LOW], field.metadata[_HIGH]
            if not low <= getattr(self, field.name) <= high:
                raise ConfigError("--" + field.name.replace("_", "-"), f"must be {low:.10g} to {high:.10g}")


DEFAULT_LIMITS = RequestLimits()


def limit_flag(name: str, default: float | None = None) -> Any:
    """The limit as an option of a service's configuration; another `default` than the usual one may hold."""
    field = RequestLimits.__dataclass_fields__[name]
    value = field.default if default is None else default
    return dataclasses.field(default=value, metadata=dict(field.metadata), kw_only=True)


def limits_of(config: Any) -> RequestLimits:
    """The limits of a configuration: those that it has flags for, and the usual ones. Raises ConfigError."""
    names = [field.name for field in dataclasses.fields(RequestLimits) if hasattr(config, field.name)]
    return RequestLimits(**{name: getattr(config, name) for name in names})


@dataclass(frozen=True)
class SamplingLimitFlags:
    """The limits that gateway and engine both judge, as flags of theirs."""

    max_logprobs: int = limit_flag("max_logprobs")
    max_logit_bias: int = limit_flag("max_logit_bias")
    max_stop_token_ids: int = limit_flag("max_stop_token_ids")
    max_message_bytes: int = limit_flag("max_message_bytes")
    max_metadata_bytes: int = limit_flag("max_metadata_bytes")
    max_connections: int = limit_flag("max_connections")


@dataclass(frozen=True)
class TextLimitFlags(SamplingLimitFlags):
    """All limits, as flags of a service that sees text."""

    max_n: int = limit_flag("max_n")
    max_text_bytes: int = limit_flag("max_text_bytes")
    max_messages: int = limit_flag("max_messages")
    max_stop_strings: int = limit_flag("max_stop_strings")
    max_stop_bytes: int = limit_flag("max_stop_bytes")
    max_request_seconds: float = limit_flag("max_request_seconds")
    max_streams_per_connection: int = limit_flag("max_streams_per_connection")
    max_idle_seconds: float = limit_flag("max_idle_seconds")
    max_body_bytes: int = limit_flag("max_body_bytes")
    max_header_bytes: int = limit_flag("max_header_bytes")
    max_prompts: int = limit_flag("max_prompts")
