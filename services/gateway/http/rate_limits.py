"""Where a key stands, in the headers that OpenAI's clients read. Knows the account, not the request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from services.gateway.admission.quotas import QuotaState


def rate_limit_headers(states: Mapping[str, QuotaState]) -> Iterator[tuple[bytes, bytes]]:
    """x-ratelimit-{limit,remaining,reset}-{requests,tokens}, for what has a limit. The limit is what the
    bucket holds: one second's requests, one minute's tokens; the reset is when it would be full again.
    """
    for name, state in states.items():
        values = (
            ("limit", str(int(state.limit))),
            ("remaining", str(int(state.remaining))),
            ("reset", _duration(state.reset_s)),
        )
        for what, value in values:
            yield f"x-ratelimit-{what}-{name}".encode(), value.encode()


def _duration(seconds: float) -> str:
    """As in "6m0s" and "120ms"."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
