"""A bucket that fills at a steady rate and lets pass what it holds. Told the time; knows no clock, no caller,
no unit.
"""

from __future__ import annotations

# Sums of floats miss what they stand for by about so much of the capacity: what is that near fits.
_TOLERANCE = 1e-9


class TokenBucket:
    """`rate` a second flows in until `capacity` is reached; both above 0. It begins full.

    What is larger than the bucket passes when the bucket is full, and leaves a debt that must flow in before
    anything else passes. So within any span of t seconds at most capacity + rate x t pass, and one that is
    larger than the bucket.
    """

    __slots__ = ("_at", "_level", "capacity", "rate")

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self.rate = rate
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def level(self, now: float) -> float:
        """What it holds; below 0 is a debt. `now` is in seconds of any clock that does not go back."""
        if now > self._at:
            self._level = min(self.capacity, self._level + self.rate * (now - self._at))
            self._at = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` fits if nothing else is taken; 0 when it fits now."""
        missing = min(amount, self.capacity) - self.level(now)
        return missing / self.rate if missing > _TOLERANCE * self.capacity else 0.0

    def fill_s(self, now: float) -> float:
        """Seconds until it is full if nothing is taken."""
        return self.wait_s(self.capacity, now)

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether it fits or not."""
        self._level = self.level(now) - amount

    def give(self, amount: float, now: float) -> None:
        """Put back what was taken and not used. What is above the capacity is lost."""
        self._level = min(self.capacity, self.level(now) + amount)

    def resize(self, rate: float, capacity: float, now: float) -> None:
        """Another rate and capacity; what is in use stays in use."""
        level = self.level(now)
        self._level = min(capacity, level + capacity - self.capacity)
        self.rate, self.capacity = rate, capacity
