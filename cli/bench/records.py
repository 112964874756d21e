"""What is written down about one request while it runs. Knows no transport, and computes nothing but counts.

Times are seconds of `time.perf_counter`, one clock for all processes of a machine.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

OK, FAILED, CANCELLED, INTERRUPTED = "ok", "failed", "cancelled", "interrupted"
OUTCOMES = (OK, FAILED, CANCELLED, INTERRUPTED)
"""How a sent request ended, each of them one: the answer came whole; it did not; the plan cancelled it; the
user stopped the run.
"""
MEASURED, TO_CANCEL, SLOW = "measured", "cancelled", "slow"
GROUPS = (MEASURED, TO_CANCEL, SLOW)


@dataclass(slots=True)
class Record:
    """One request. `scheduled` is when it should have been sent; its latency counts from there."""

    index: int
    turn: int
    group: str
    scheduled: float
    asked_tokens: int
    cancel_after: int | None = None
    due: float | None = None  # when the load's clock said so, before waiting for --max-concurrency
    woken: float | None = None  # when the scheduler came to it
    sent: float = 0.0
    end: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("L"))
    outcome: str = ""
    status: str = ""
    reason: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    num_received: int = (
        0  # a sum of `counts`, kept: adding them up for each message would grow with its square
    )

    def arrived(self, now: float, num_tokens: int) -> bool:
        """A message with tokens has come; 0 where the server does not say how many. True: cancel now."""
        self.times.append(now)
        self.counts.append(num_tokens)
        # Where a message does not say how many tokens it holds it counts as one.
        self.num_received += num_tokens or 1
        return self.cancel_after is not None and self.num_received >= self.cancel_after

    def ended(self, now: float, outcome: str, status: str = "", reason: str = "") -> None:
        """The one way out. The first call holds."""
        if not self.outcome:
            self.end, self.outcome = now, outcome
            self.status, self.reason = status, " ".join(reason.split())[:200]

    @property
    def has_counts(self) -> bool:
        """Whether every message said how many tokens it held."""
        return all(self.counts)

    @property
    def num_tokens(self) -> int | None:
        """Output tokens: the server's usage, else what the messages said, else unknown."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return sum(self.counts) if self.has_counts else None
