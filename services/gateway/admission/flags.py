"""The flags of quotas and of the order of the queue. Part of the gateway's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.admission.quotas import QuotaLimits
from weft.config import ConfigError, option


@dataclass(frozen=True)
class AdmissionFlags:
    """What a key may use that states no limit of its own, and how long a class of priority may wait."""

    key_requests_per_second: float | None = option(
        None, "requests a second of a key that states none; callers without a key share one", metavar="N"
    )
    key_tokens_per_minute: float | None = option(
        None, "prompt and output tokens a minute of a key that states none", metavar="N"
    )
    key_max_streams: int | None = option(None, "requests in flight of a key that states none", metavar="N")
    priority_ageing_seconds: float = option(
        10.0, "how long a class of priority waits before it gets a part of the starts all the same"
    )


def check_admission_flags(flags: AdmissionFlags) -> None:
    """Raises ConfigError, naming the flag."""
    for name in (
        "key_requests_per_second",
        "key_tokens_per_minute",
        "key_max_streams",
        "priority_ageing_seconds",
    ):
        value = getattr(flags, name)
        if value is not None and value <= 0:
            raise ConfigError("--" + name.replace("_", "-"), "must be above 0")


def quota_limits_of(flags: AdmissionFlags) -> QuotaLimits:
    """What holds for keys without limits of their own."""
    return QuotaLimits(flags.key_requests_per_second, flags.key_tokens_per_minute, flags.key_max_streams)
