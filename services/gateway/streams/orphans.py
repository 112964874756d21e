"""What is kept for a client that may come back: each thing for a while, all of them within a bound.

Over the bound the oldest goes. Knows neither requests nor clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class Kept(Protocol):
    """Something that is kept."""

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes now."""

    def expire(self) -> None:
        """Its time is over, or its room is needed. It is no longer kept when this is called."""


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """How long a thing is kept, in seconds, and how much is kept in all."""

    ttl_s: float = 30.0
    max_items: int = 1024
    max_bytes: int = 256 << 20


class Retention:
    """Keeps things, oldest first. Nothing is kept twice."""

    def __init__(self, limits: RetentionLimits) -> None:
        self.limits = limits
        self.num_expired = 0
        self.num_crowded_out = 0
        self._timers: dict[Kept, asyncio.TimerHandle] = {}
        # As counted last: counting all of them each time that one comes would take milliseconds.
        self._sizes: dict[Kept, int] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._timers)

    def __iter__(self) -> Iterator[Kept]:
        return iter(tuple(self._timers))

    @property
    def num_bytes(self) -> int:
        """About how much memory all of it takes, as of the last `hold_to_bounds`."""
        return self._num_bytes

    def keep(self, item: Kept) -> None:
        """Keep a thing from now on for `ttl_s`; anew when it was kept before."""
        self.release(item)
        loop = asyncio.get_running_loop()
        self._timers[item] = loop.call_later(self.limits.ttl_s, self._expire, item)
        self._measure(item)
        self._end_oldest()

    def release(self, item: Kept) -> bool:
        """Let go of a thing without ending it. False when it was not kept."""
        timer = self._timers.pop(item, None)
        if timer is not None:
            timer.cancel()
            self._num_bytes -= self._sizes.pop(item)
        return timer is not None

    def hold_to_bounds(self) -> None:
        """Measure again, as things grow while they are kept, and end the oldest until all is in bounds."""
        for item in self._timers:
            self._measure(item)
        self._end_oldest()

    def _measure(self, item: Kept) -> None:
        size = item.num_bytes
        self._num_bytes += size - self._sizes.get(item, 0)
        self._sizes[item] = size

    def _end_oldest(self) -> None:
        limits = self.limits
        while self._timers and (len(self) > limits.max_items or self._num_bytes > limits.max_bytes):
            self.num_crowded_out += 1
            self._end(next(iter(self._timers)))

    def end_all(self) -> None:
        """End everything that is kept."""
        for item in self:
            self._end(item)

    def _expire(self, item: Kept) -> None:
        self.num_expired += 1
        self._end(item)

    def _end(self, item: Kept) -> None:
        if self.release(item):
            item.expire()
