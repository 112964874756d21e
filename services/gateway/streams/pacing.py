"""When a stream's new tokens go out: at once while the event loop has time, together while it has not.

A message costs the same whether it holds one token or eight, so a loop that is busy sending is helped by
sending less often. Knows which streams have tokens and how long the loop took to send; knows nothing of what
they send, nor of clients: what waits for a client that reads slowly goes out together without this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

# After a round of sending the loop rests so many times as long as the round took.
REST = 2.0


class Paced(Protocol):
    """A stream whose tokens may be held. `wake` clears `is_held`."""

    is_held: bool

    def wake(self) -> None:
        """Let the stream send what it has."""


class Clock(Protocol):
    """What is used of an event loop."""

    def time(self) -> float:
        """Seconds."""

    def call_soon(self, callback: Callable[[], object]) -> Any:
        """Call after everything that is ready now."""

    def call_at(self, when: float, callback: Callable[[], object]) -> Any:
        """Call at that time."""


class Pacer:
    """Holds tokens back for at most `max_hold_s` seconds; 0 holds nothing.

    A round begins with a frame's first token and ends once the loop has been through all the streams that
    the frame woke. For `REST` times its length, tokens that come are held, to go out as the next round. So a
    loop that sends for less than a third of the time holds nothing. Without `clock` it is the running loop.
    """

    def __init__(self, max_hold_s: float, *, clock: Clock | None = None) -> None:
        self.max_hold_s = max_hold_s
        self.num_held = 0
        self._clock = clock
        self._held: list[Paced] = []
        self._held_since = 0.0
        self._is_opening = False  # the frame that began the round is still being handed out
        self._is_sending = False
        self._began = 0.0
        self._rests_until = 0.0
        self._has_timer = False

    def on_tokens(self, stream: Paced) -> None:
        """A stream has new tokens: wake it now or, for a while, not."""
        if self._is_opening or self.max_hold_s <= 0:
            stream.wake()
        elif not stream.is_held:
            now = self._loop().time()
            if self._is_sending or self._held or now < self._rests_until:
                self._hold(stream, now)
            else:
                self._begin(now)
                stream.wake()

    def _hold(self, stream: Paced, now: float) -> None:
        stream.is_held = True
        self.num_held += 1
        if not self._held:
            self._held_since = now
        self._held.append(stream)
        if not self._is_sending:
            self._set_timer()

    def _begin(self, now: float) -> None:
        self._is_opening = self._is_sending = True
        self._began = now
        self._loop().call_soon(self._opened)

    def _opened(self) -> None:
        """The woken streams are about to run: what this puts behind them runs when they have."""
        self._is_opening = False
        self._loop().call_soon(self._sent)

    def _sent(self) -> None:
        now = self._loop().time()
        self._is_sending = False
        self._rests_until = now + min(REST * (now - self._began), self.max_hold_s)
        if self._held:
            self._set_timer()

    def _set_timer(self) -> None:
        if not self._has_timer:
            self._has_timer = True
            at = min(self._rests_until, self._held_since + self.max_hold_s)
            self._loop().call_at(at, self._release)

    def _release(self) -> None:
        self._has_timer = False
        held, self._held = self._held, []
        self._begin(self._loop().time())
        for stream in held:
            stream.wake()

    def _loop(self) -> Clock:
        if self._clock is None:
            self._clock = asyncio.get_running_loop()
        return self._clock


# Holds nothing, and has no clock that could belong to another loop.
AT_ONCE = Pacer(0.0)
