"""When tokens go out: a clock that is told what time it is, and a loop that is told how long it works."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import pytest

from services.gateway.streams.pacing import REST, Pacer

MAX_HOLD_S = 0.020


class FakeLoop:
    """Runs callbacks in an event loop's order; work takes the time that it says it takes."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ready: list[Callable[[], object]] = []
        self.timers: list[tuple[float, int, Callable[[], object]]] = []
        self.numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.ready.append(callback)

    def call_at(self, when: float, callback: Callable[[], object]) -> None:
        heapq.heappush(self.timers, (when, next(self.numbers), callback))

    def turn(self) -> None:
        """One iteration: timers that are due, then what is ready now, but not what that makes ready."""
        while self.timers and self.timers[0][0] <= self.now:
            self.ready.append(heapq.heappop(self.timers)[2])
        ready, self.ready = self.ready, []
        for callback in ready:
            callback()

    def run_until(self, when: float) -> None:
        while True:
            while self.ready or (self.timers and self.timers[0][0] <= self.now):
                self.turn()
            if not self.timers or self.timers[0][0] > when:
                break
            self.now = max(self.now, self.timers[0][0])
        self.now = max(self.now, when)


class Stream:
    """Sends for `work_s` when it is woken, in the loop's next turn."""

    def __init__(self, loop: FakeLoop, work_s: float) -> None:
        self.loop = loop
        self.work_s = work_s
        self.is_held = False
        self.pending: list[float] = []
        self.sent: list[tuple[float, int]] = []
        self.waits: list[float] = []
        self.is_woken = False

    def token(self, pacer: Pacer) -> None:
        self.pending.append(self.loop.now)
        pacer.on_tokens(self)

    def wake(self) -> None:
        self.is_held = False
        if not self.is_woken:
            self.is_woken = True
            self.loop.call_soon(self.send)

    def send(self) -> None:
        self.is_woken = False
        if self.pending:
            self.waits += [self.loop.now - came for came in self.pending]
            self.sent.append((self.loop.now, len(self.pending)))
            self.pending.clear()
            self.loop.now += self.work_s


@pytest.fixture
def loop() -> FakeLoop:
    return FakeLoop()


def frames(loop: FakeLoop, pacer: Pacer, streams: list[Stream], count: int, step_s: float) -> None:
    """A frame with a token of each stream every `step_s`, as late as the loop is."""
    for number in range(count):
        loop.run_until(100.0 + number * step_s)
        for stream in streams:
            stream.token(pacer)
    loop.run_until(loop.now + 1.0)


def test_an_idle_loop_holds_nothing(loop: FakeLoop) -> None:
    """Eight streams, sending for 0.4 of 5 ms: each token goes alone, after the streams before it."""
    pacer = Pacer(MAX_HOLD_S, clock=loop)
    streams = [Stream(loop, 50e-6) for _ in range(8)]
    frames(loop, pacer, streams, 100, 0.005)
    assert pacer.num_held == 0
    for number, stream in enumerate(streams):
        assert [size for _, size in stream.sent] == [1] * 100
        assert max(stream.waits) < number * 50e-6 + 1e-9


def test_the_first_frame_goes_at_once_to_all(loop: FakeLoop) -> None:
    pacer = Pacer(MAX_HOLD_S, clock=loop)
    streams = [Stream(loop, 50e-6) for _ in range(256)]
    frames(loop, pacer, streams, 1, 0.005)
    assert pacer.num_held == 0
    assert all(stream.waits[0] < 256 * 50e-6 for stream in streams)


def test_a_busy_loop_sends_several_together(loop: FakeLoop) -> None:
    """256 streams that take 10 ms to send every 5 ms could never keep up one by one."""
    pacer = Pacer(MAX_HOLD_S, clock=loop)
    streams = [Stream(loop, 40e-6) for _ in range(256)]
    frames(loop, pacer, streams, 200, 0.005)
    assert all(sum(size for _, size in stream.sent) == 200 for stream in streams)
    num_messages = sum(len(stream.sent) for stream in streams)
    assert 3.0 < 256 * 200 / num_messages < 6.0
    # A round in front of it, at most, then its rest, and the streams before it.
    assert max(max(stream.waits) for stream in streams) < 256 * 40e-6 * 3


@pytest.mark.parametrize("work_s", [1e-3, 30e-3, 0.2])
def test_nothing_is_held_longer_than_said(loop: FakeLoop, work_s: float) -> None:
    """However long a round took, what comes after it waits for the bound and no longer."""
    pacer = Pacer(MAX_HOLD_S, clock=loop)
    busy, other = Stream(loop, work_s), Stream(loop, 0.0)
    busy.token(pacer)
    loop.run_until(loop.now)
    came = loop.now
    other.token(pacer)
    loop.run_until(came + 1.0)
    assert pacer.num_held == 1
    assert other.sent[0][0] - came == pytest.approx(min(REST * work_s, MAX_HOLD_S))


def test_what_comes_while_the_loop_sends_counts_from_then(loop: FakeLoop) -> None:
    """A token that came 15 ms before the end of a round is not held 20 ms more."""
    pacer = Pacer(MAX_HOLD_S, clock=loop)
    first, late, other = Stream(loop, 0.010), Stream(loop, 0.015), Stream(loop, 0.0)
    first.token(pacer)
    late.token(pacer)
    loop.turn()  # both are about to send
    loop.ready.insert(1, lambda: other.token(pacer))
    loop.run_until(loop.now + 1.0)
    assert pacer.num_held == 1
    assert other.waits == [pytest.approx(MAX_HOLD_S)]


def test_zero_holds_nothing(loop: FakeLoop) -> None:
    pacer = Pacer(0.0, clock=loop)
    streams = [Stream(loop, 40e-6) for _ in range(256)]
    frames(loop, pacer, streams, 20, 0.011)
    assert pacer.num_held == 0
    assert all([size for _, size in stream.sent] == [1] * 20 for stream in streams)


def test_a_stream_that_was_woken_for_another_reason_may_be_held_again(loop: FakeLoop) -> None:
    """Its end wakes it at once; the pacer's own wake later is one too many, and does no harm."""
    pacer = Pacer(MAX_HOLD_S, clock=loop)
    busy, other = Stream(loop, 0.015), Stream(loop, 0.0)
    busy.token(pacer)
    loop.run_until(loop.now)
    other.token(pacer)
    assert other.is_held
    other.wake()
    loop.run_until(loop.now)
    assert len(other.sent) == 1
    other.token(pacer)
    assert other.is_held
    loop.run_until(loop.now + 1.0)
    assert not other.is_held
    assert [size for _, size in other.sent] == [1, 1]
