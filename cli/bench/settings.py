"""What a run is asked to do: plain values, checked here, sent to other processes as they are.

Knows no transport and no terminal. A bad value or a combination that means nothing raises SettingsError with
the one line that the user reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

METRICS = ("ttft", "itl", "tpot", "e2e")
WORKLOADS = ("fixed", "random", "shared-prefix", "multi-turn", "trace", "text")
ARRIVALS = ("poisson", "constant", "gamma")
ENDPOINTS = ("completions", "chat")
MAX_PROCESSES = 64


class SettingsError(ValueError):
    """A flag whose value, or whose company, makes no sense."""


@dataclass(frozen=True)
class Load:
    """How requests come: `concurrency` at once (closed loop), `rate` a second (open loop), or neither: at the
    times of a trace.
    """

    concurrency: int | None = None
    rate: float | None = None

    @property
    def kind(self) -> str:
        """closed, open or trace."""
        return "closed" if self.concurrency is not None else "open" if self.rate is not None else "trace"

    @property
    def label(self) -> str:
        """As in the table's first column."""
        if self.concurrency is not None:
            return f"c={self.concurrency}"
        return f"{self.rate:g}/s" if self.rate is not None else "trace"


@dataclass(frozen=True)
class Target:
    """A request is good when its `metric` is at most `limit_ms`."""

    metric: str
    limit_ms: float

    def __str__(self) -> str:
        return f"{self.metric}:{self.limit_ms:g}"


@dataclass(frozen=True)
class WorkloadSettings:
    """What is asked. Lengths are in tokens; a pair is the least and the most, drawn evenly."""

    kind: str = "fixed"
    input_tokens: tuple[int, int] = (128, 128)
    output_tokens: tuple[int, int] = (128, 128)
    prefix_groups: int = 8
    prefix_tokens: int = 512
    turns: int = 4
    think_s: float = 0.0
    path: str | None = None
    time_scale: float = 1.0
    trace_limit: int | None = None
    is_ignoring_eos: bool = True
    temperature: float | None = None


@dataclass(frozen=True)
class ServerSettings:
    """Whom to ask, and how. `url` is set for HTTP, `target` for gRPC."""

    target: str
    url: str | None = None
    endpoint: str = "completions"
    is_multiplexed: bool = False
    model: str = ""
    api_key: str = field(default="", repr=False)
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_name: str | None = None
    num_channels: int | None = None
    extra_body: dict[str, object] = field(default_factory=dict)

    @property
    def transport(self) -> str:
        """grpc, multiplex or http."""
        return "http" if self.url else "multiplex" if self.is_multiplexed else "grpc"


@dataclass(frozen=True)
class Settings:
    """One run: every point of `loads`, each with the same workload and the same number of requests."""

    server: ServerSettings
    loads: tuple[Load, ...]
    workload: WorkloadSettings = WorkloadSettings()
    num_requests: int | None = None
    duration_s: float | None = None
    num_warmup: int = 0
    arrivals: str = "poisson"
    burstiness: float = 1.0
    max_concurrency: int | None = None
    targets: tuple[Target, ...] = ()
    cancel_fraction: float = 0.0
    slow_fraction: float = 0.0
    slow_pause_s: float = 0.2
    timeout_s: float = 600.0
    seed: int = 1
    cache_salt: str = ""
    num_processes: int = 1
    max_model_len: int | None = None


def parse_numbers(text: str, flag: str, kind: type[int] | type[float]) -> list[float]:
    """A list as in "1,4,16". Raises SettingsError."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        word = "whole numbers" if kind is int else "numbers"
        raise SettingsError(f"{flag} takes {word} with commas between, as in 1,4,16; not {text!r}") from None
    if any(not 0 < value < 1e9 for value in values):
        raise SettingsError(f"{flag} must be above 0")
    if len(set(values)) != len(values):
        raise SettingsError(f"{flag} names a load twice")
    return values


def parse_range(text: str, flag: str) -> tuple[int, int]:
    """A length, or a range of lengths as in "100:300". Raises SettingsError."""
    low, _, high = text.partition(":")
    try:
        pair = int(low), int(high or low)
    except ValueError:
        raise SettingsError(f"{flag} takes a number of tokens, or a range as 100:300; not {text!r}") from None
    if not 1 <= pair[0] <= pair[1] <= 1 << 24:
        raise SettingsError(f"{flag}: a length is at least 1, and a range goes upwards")
    return pair


def parse_target(text: str) -> Target:
    """A goodput target, as in "ttft:500" (milliseconds). Raises SettingsError."""
    metric, _, limit = text.partition(":")
    try:
        limit_ms = float(limit)
    except ValueError:
        limit_ms = -1.0
    if metric not in METRICS or not 0 < limit_ms < 1e12:
        names = ", ".join(METRICS)
        raise SettingsError(f"--goodput takes METRIC:MILLISECONDS with one of {names}; not {text!r}")
    return Target(metric, limit_ms)


def check(settings: Settings) -> None:
    """Refuse what contradicts itself. Raises SettingsError."""
    _check_finite(settings)
    _check_load(settings)
    _check_workload(settings)
    server = settings.server
    for name in ("cancel_fraction", "slow_fraction"):
        if not 0 <= getattr(settings, name) <= 1:
            raise SettingsError(f"--{_FRACTIONS[name]} must be 0 to 1")
    if settings.cancel_fraction + settings.slow_fraction > 1:
        raise SettingsError("--cancel-fraction and --slow-readers come to more than 1 together")
    if settings.slow_fraction and server.is_multiplexed:
        raise SettingsError("--slow-readers needs a stream of its own for each request: not with --multiplex")
    if settings.cancel_fraction and settings.workload.kind == "multi-turn":
        raise SettingsError("--cancel-fraction would end conversations half way: not with multi-turn")
    if server.is_multiplexed and server.url:
        raise SettingsError("--multiplex is gRPC; leave out --url")
    if server.url is None and server.endpoint == "chat" and settings.workload.kind != "text":
        raise SettingsError("--endpoint chat over gRPC is for --workload text: token ids are no chat")
    if server.extra_body and not server.url:
        raise SettingsError("--extra-body is for HTTP: it needs --url")
    if not settings.slow_pause_s > 0:
        raise SettingsError("--slow-pause must be above 0")
    if settings.slow_pause_s != Settings.slow_pause_s and not settings.slow_fraction:
        raise SettingsError("--slow-pause is of --slow-readers")
    if not settings.timeout_s > 0:
        raise SettingsError("--timeout must be above 0")
    if not 1 <= settings.num_processes <= MAX_PROCESSES:
        raise SettingsError(f"--processes must be 1 to {MAX_PROCESSES}")
    if len({target.metric for target in settings.targets}) != len(settings.targets):
        raise SettingsError("--goodput names a metric twice")


_FRACTIONS = {"cancel_fraction": "cancel-fraction", "slow_fraction": "slow-readers"}


def _check_finite(settings: Settings) -> None:
    workload = settings.workload
    for name, value in (
        ("--duration", settings.duration_s),
        ("--burstiness", settings.burstiness),
        ("--slow-pause", settings.slow_pause_s),
        ("--timeout", settings.timeout_s),
        ("--think-time", workload.think_s),
        ("--time-scale", workload.time_scale),
        ("--temperature", workload.temperature),
    ):
        if value is not None and not math.isfinite(value):
            raise SettingsError(f"{name} must be a finite number")


def _check_load(settings: Settings) -> None:
    kinds = {load.kind for load in settings.loads}
    if len(kinds) != 1:
        raise SettingsError("give --concurrency (closed loop) or --rate (open loop), not both")
    if settings.num_requests is not None and settings.duration_s is not None:
        raise SettingsError("give --requests or --duration, not both")
    for name, value in (
        ("--requests", settings.num_requests),
        ("--duration", settings.duration_s),
        ("--burstiness", settings.burstiness),
        ("--max-concurrency", settings.max_concurrency),
    ):
        if value is not None and not value > 0:
            raise SettingsError(f"{name} must be above 0")
    if settings.num_warmup < 0:
        raise SettingsError("--warmup must not be negative")
    if settings.arrivals not in ARRIVALS:
        raise SettingsError(f"--arrivals is one of {', '.join(ARRIVALS)}")
    if settings.arrivals != "gamma" and settings.burstiness != 1.0:
        raise SettingsError("--burstiness is the shape of gamma arrivals: it needs --arrivals gamma")
    if kinds == {"closed"}:
        if settings.max_concurrency is not None:
            raise SettingsError("--max-concurrency bounds an open loop; --concurrency is the closed one")
        if settings.arrivals != "poisson":
            raise SettingsError("--arrivals is for --rate: a closed loop sends when an answer has come")
        most = min(load.concurrency or 0 for load in settings.loads)
        if settings.num_processes > most:
            raise SettingsError("--processes is more than --concurrency: each needs a request in flight")
    elif kinds == {"trace"} and settings.arrivals != "poisson":
        raise SettingsError("--arrivals is for --rate: a trace has times of its own")
    elif settings.max_concurrency is not None and settings.num_processes > settings.max_concurrency:
        raise SettingsError("--processes is more than --max-concurrency")


def _check_workload(settings: Settings) -> None:
    workload = settings.workload
    if workload.kind not in WORKLOADS:
        raise SettingsError(f"--workload is one of {', '.join(WORKLOADS)}")
    needs_file = workload.kind in ("trace", "text")
    if needs_file and workload.path is None:
        raise SettingsError(f"--workload {workload.kind} needs --file")
    if not needs_file and workload.path is not None:
        raise SettingsError("--file is for --workload trace and text")
    if (
        workload.kind == "trace"
        and settings.loads != (Load(),)
        and any(load.kind == "trace" for load in settings.loads)
    ):
        raise SettingsError("a trace has its own times: leave out --concurrency and --rate")
    if not workload.time_scale > 0:
        raise SettingsError("--time-scale must be above 0")
    if workload.trace_limit is not None and workload.trace_limit < 1:
        raise SettingsError("--trace-limit must be at least 1")
    if workload.kind != "trace" and (workload.time_scale != 1.0 or workload.trace_limit is not None):
        raise SettingsError("--time-scale and --trace-limit are for --workload trace")
    usual = WorkloadSettings()
    for name, flag, kind in (
        ("turns", "--turns", "multi-turn"),
        ("think_s", "--think-time", "multi-turn"),
        ("prefix_groups", "--prefix-groups", "shared-prefix"),
        ("prefix_tokens", "--prefix-tokens", "shared-prefix"),
    ):
        if workload.kind != kind and getattr(workload, name) != getattr(usual, name):
            raise SettingsError(f"{flag} is for --workload {kind}")
    if min(workload.prefix_groups, workload.prefix_tokens, workload.turns) < 1:
        raise SettingsError("--prefix-groups, --prefix-tokens and --turns must be at least 1")
    if workload.think_s < 0:
        raise SettingsError("--think-time must not be negative")
