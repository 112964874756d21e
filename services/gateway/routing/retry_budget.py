"""How many samples may be started again, over the whole gateway. Pure: it is told the time.

One dead engine brings all its samples back at once, and that is fine; what must not be is that restarts
become most of the work. Samples are never ended by this: they wait until there is a token.
"""

from __future__ import annotations


class RetryBudget:
    """A bucket: every start brings `share` tokens, every second brings `floor_per_s`, a restart takes one. It
    begins with `initial` and never holds more than `most`.
    """

    def __init__(
        self, *, share: float = 1.0, floor_per_s: float = 20.0, initial: float = 256.0, most: float = 16_384.0
    ) -> None:
        self._share = share
        self._floor_per_s = floor_per_s
        self._most = most
        self._tokens = initial
        self._at: float | None = None

    def start(self) -> None:
        """A sample was started for the first time."""
        self._tokens = min(self._most, self._tokens + self._share)

    def has_token(self, now: float) -> bool:
        """Whether a sample may be started again."""
        self._refill(now)
        return self._tokens >= 1.0

    def take(self, now: float) -> None:
        """A sample was started again."""
        self._refill(now)
        self._tokens = max(0.0, self._tokens - 1.0)

    def tokens(self, now: float) -> float:
        """How many are left."""
        self._refill(now)
        return self._tokens

    def _refill(self, now: float) -> None:
        if self._at is not None:
            self._tokens = min(self._most, self._tokens + max(0.0, now - self._at) * self._floor_per_s)
        self._at = now
