"""Samples that have no engine now, each with the time of its next try. Knows no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.gateway.streams.live import LiveSample


class WaitingRoom:
    """`retry` is called with a sample whose time has come, and that has left the room;
    `give_up` with one that has waited too long.
    """

    def __init__(
        self, wait_s: float, retry: Callable[[LiveSample], None], give_up: Callable[[LiveSample], None]
    ) -> None:
        self._wait_s = wait_s
        self._retry = retry
        self._give_up = give_up
        self._timers: dict[LiveSample, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._timers)

    def samples(self) -> list[LiveSample]:
        """Who waits, longest first."""
        return sorted(self._timers, key=lambda sample: sample.route.lost_at or 0.0)

    def add(self, sample: LiveSample, retry_s: float) -> None:
        """Try again after `retry_s`, unless it is called earlier; give up after `wait_s` in all, or shortly
        before the deadline.
        """
        now = sample.request.now()
        if sample.route.lost_at is None:
            sample.route.lost_at = now
        until = sample.route.lost_at + self._wait_s
        deadline = sample.request.resolved.deadline
        if deadline is not None:
            until = min(until, deadline - 0.05)
        then = self._retry if now + retry_s < until else self._give_up
        delay_s = max(0.0, min(retry_s, until - now))
        self._timers[sample] = asyncio.get_running_loop().call_later(delay_s, self._leave, sample, then)

    def remove(self, sample: LiveSample) -> None:
        """The sample waits no more."""
        self._timers.pop(sample).cancel()

    def _leave(self, sample: LiveSample, then: Callable[[LiveSample], None]) -> None:
        del self._timers[sample]
        then(sample)
