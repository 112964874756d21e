"""When to leave an engine alone for a while. Pure: it is told what happened, and when.

Knows no engine and refuses nothing by itself: the router prefers engines whose breaker is closed, and takes
another only when there is none.
"""

from __future__ import annotations

import random
from enum import Enum

MAX_FAILURES = 3
MIN_OPEN_S = 0.5
MAX_OPEN_S = 15.0
JITTER = 0.25


class BreakerState(Enum):
    """Closed: use it. Open: do not. Half open: one request may try."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Opens after `max_failures` failures in a row. Times are in seconds of one monotonic clock.

    After failed work it stays open for a jittered time that doubles with every failed probe, from
    `min_open_s` to `max_open_s`; an engine that cannot be reached is open until it answers. Then one request
    is let through, and its success closes it; an engine that was merely away is closed at once.
    """

    def __init__(
        self,
        *,
        max_failures: int = MAX_FAILURES,
        min_open_s: float = MIN_OPEN_S,
        max_open_s: float = MAX_OPEN_S,
        rng: random.Random | None = None,
    ) -> None:
        self.num_opened = 0
        self._max_failures = max_failures
        self._min_open_s = min_open_s
        self._max_open_s = max_open_s
        self._rng = rng or random.Random()
        self._num_failures = 0
        self._num_openings = 0  # in a row
        self._num_unreached = 0
        self._open_until: float | None = None
        self._probe_until: float | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing failed since the last success."""
        return not self._num_failures and self._open_until is None

    def state(self, now: float) -> BreakerState:
        """What holds now."""
        if self._num_unreached >= self._max_failures:
            return BreakerState.OPEN
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until else BreakerState.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether a request may go to the engine: in half open, one at a time."""
        state = self.state(now)
        if state is BreakerState.HALF_OPEN:
            return self._probe_until is None or now >= self._probe_until
        return state is BreakerState.CLOSED

    def begin(self, now: float) -> None:
        """A request goes to the engine. In half open it is the probe; one that is never heard of again gives
        way to another after the longest open time.
        """
        if self.state(now) is BreakerState.HALF_OPEN:
            self._probe_until = now + self._max_open_s

    def succeed(self) -> None:
        """The engine did what was asked of it."""
        self._num_failures = self._num_openings = 0
        self._open_until = self._probe_until = None

    def fail(self, now: float) -> None:
        """The engine was lost while it worked, or failed a request by a fault of its own."""
        state = self.state(now)
        self._num_failures += 1
        self._probe_until = None
        if state is not BreakerState.HALF_OPEN and self._num_failures < self._max_failures:
            return
        open_s = min(self._max_open_s, self._min_open_s * 2 ** min(self._num_openings, 30))
        self._open_until = now + open_s * self._rng.uniform(1 - JITTER, 1 + JITTER)
        self._num_openings += 1
        self.num_opened += 1

    def fail_to_connect(self) -> None:
        """The engine could not be reached."""
        self._num_unreached += 1
        self.num_opened += self._num_unreached == self._max_failures

    def connect(self, now: float) -> None:
        """The engine answers. One that failed before it went away is tried with one request first."""
        self._num_unreached = 0
        if self._num_failures and self._open_until is None:
            self._open_until = now
