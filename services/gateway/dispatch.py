"""When a request starts: at once while engines have room, else in the order of the fair queue.

One queue per artifact, so that who waits for one model holds up nobody else's. What a running request draws
is charged to its key when that matters: before the next one is chosen. Knows requests and callers; which
engine, and whether there is room, it asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grpc

from services.gateway.fair_queue import CLASSES, Entry, FairQueue, KeyQueue, class_of
from services.gateway.live import LiveRequest, LiveSample
from weft.rpc.auth import Caller
from weft.rpc.errors import StatusError
from weft.v1 import engine_service_pb2 as engine_pb

# Service in tokens, as in the paper on virtual token counters: one of output costs about as much as two of
# prompt.
PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
# While somebody waits, running requests are charged at most so often.
SETTLE_S = 0.02
# And the queue is looked at so often, in case whoever had room did not say so.
LOOK_S = 0.25
# The pace of starts is the mean over about so many.
_MEMORY = 64


class Waiting(NamedTuple):
    """One line of the statistics."""

    model: str
    priority: str
    num_requests: int


class Turn:
    """One request, from when it asks to start until it is over. `leave` may come twice."""

    __slots__ = (
        "charged",
        "entry",
        "has_begun",
        "has_waited",
        "key",
        "live",
        "num_drawn_before",
        "pool",
        "queued_at",
        "timer",
    )

    def __init__(self, pool: Pool, key: KeyQueue[Turn], live: LiveRequest, now: float) -> None:
        self.pool = pool
        self.key = key
        self.live = live
        self.queued_at = now
        # What it had drawn before, if it goes on with a request that had ended, was charged then.
        self.charged = self.num_drawn_before = num_drawn(live)
        self.has_begun = False
        self.has_waited = False
        self.entry: Entry[Turn] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def used(self) -> tuple[int, int]:
        """The prompt tokens that an engine was given, once for all samples, and the output tokens drawn."""
        if not self.has_begun:
            return 0, 0
        return len(self.live.resolved.prompt_token_ids), num_drawn(self.live) - self.num_drawn_before

    def leave(self) -> None:
        """The request is over, or no longer wants to start."""
        self.pool.leave(self)

    def settle(self) -> None:
        """Charge the output drawn since the last time."""
        drawn = num_drawn(self.live)
        if drawn > self.charged:
            self.pool.queue.charge(self.key, OUTPUT_WEIGHT * (drawn - self.charged))
            self.charged = drawn


class Pool:
    """The engines of one artifact as seen from here: who waits for them, who runs on them, at what pace they
    take requests.
    """

    def __init__(self, info: engine_pb.GetInfoResponse, ageing_s: float) -> None:
        self.info = info
        self.queue: FairQueue[Turn] = FairQueue(ageing_s=ageing_s)
        self.running: set[Turn] = set()
        self.settled_at = 0.0
        self.no_engine_since: float | None = None
        self._started_at: float | None = None
        self._gap_s = 0.0
        self._num_gaps = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.running and not len(self.queue)

    def leave(self, turn: Turn) -> None:
        """The turn is over."""
        if turn.timer is not None:
            turn.timer.cancel()
            turn.timer = None
        if turn.entry is not None:
            self.queue.remove(turn.entry)
            turn.entry = None
        if turn in self.running:
            self.running.discard(turn)
            turn.settle()

    def settle(self, now: float) -> None:
        """Charge what the running requests have drawn, unless that was done a moment ago."""
        if now - self.settled_at >= SETTLE_S:
            self.settled_at = now
            for turn in self.running:
                turn.settle()

    def note_start(self, now: float) -> None:
        """One has started out of the queue. The gap to the next one counts only if somebody waits for it."""
        if self._started_at is not None:
            self._num_gaps = min(self._num_gaps + 1, _MEMORY)
            self._gap_s += (now - self._started_at - self._gap_s) / self._num_gaps
        self._started_at = now if len(self.queue) else None

    def wait_s(self, key: KeyQueue[Turn], rank: int) -> float:
        """About how long a request that this key queued now would wait; 0 while the pace is not known."""
        return (self.queue.num_before(key, rank) + 1) * self._gap_s if self._num_gaps else 0.0


class Dispatcher:
    """Starts requests. `num_places` says how many more sequences the engines of an artifact take now, None
    when there is no such engine; `place` starts a sample. A queued request whose artifact has had no engine
    for `wait_s` fails. `pump` is to be called whenever there may be more room.
    """

    def __init__(
        self,
        num_places: Callable[[engine_pb.GetInfoResponse], int | None],
        place: Callable[[LiveSample], bool],
        *,
        wait_s: float = 15.0,
        ageing_s: float = 10.0,
    ) -> None:
        self.num_queued_ever = 0
        self.num_expired = 0
        # Seconds in the queue of those that had to wait, by class.
        self.observe_wait: Callable[[str, float], None] = lambda priority, seconds: None
        self._num_places = num_places
        self._place = place
        self._wait_s = wait_s
        self._ageing_s = ageing_s
        self._pools: dict[tuple[str, str], Pool] = {}
        self._look: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(len(pool.queue) for pool in self._pools.values())

    def waiting(self) -> Iterator[Waiting]:
        """Queue lengths by model and class."""
        for pool in self._pools.values():
            for rank, name in enumerate(CLASSES):
                yield Waiting(pool.info.model_name, name, pool.queue.num_queued(rank))

    def start(self, live: LiveRequest, caller: Caller) -> Turn:
        """Start a request now, or have it wait for its turn; one that fails meanwhile is failed through
        `LiveRequest.fail`. The Turn must be left. Raises StatusError when the wait would outlast the
        deadline.
        """
        now = live.now()
        pool = self._pool(live.resolved.info)
        rank = class_of(live.resolved.priority)
        key = pool.queue.key(caller.name, caller.weight)
        must_wait = len(pool.queue) > 0 or not self._num_places(pool.info)
        if must_wait:
            self._check_deadline(live, pool.wait_s(key, rank), now)
            pool.settle(now)
        turn = Turn(pool, key, live, now)
        turn.entry = pool.queue.push(turn, key, rank=rank, now=now)
        if must_wait:
            self.num_queued_ever += 1
            turn.has_waited = True
            if live.resolved.deadline is not None:
                loop = asyncio.get_running_loop()
                turn.timer = loop.call_at(live.resolved.deadline, self._expire, turn)
        self._pump(pool, now)
        return turn

    def pump(self) -> None:
        """Start what there is room for."""
        now = asyncio.get_running_loop().time()
        for pool in list(self._pools.values()):
            if len(pool.queue):
                self._pump(pool, now)

    def _pump(self, pool: Pool, now: float) -> None:
        queue = pool.queue
        while len(queue):
            places = self._num_places(pool.info)
            if places is None:
                self._miss_engines(pool, now)
                break
            pool.no_engine_since = None
            if places <= 0:
                break
            pool.settle(now)
            entry = queue.pop(now)
            if entry is not None:
                self._begin(entry.item, now)
        if len(queue) and self._look is None:
            self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_again)

    def _begin(self, turn: Turn, now: float) -> None:
        """Its turn has come."""
        live, pool = turn.live, turn.pool
        turn.leave()
        if live.is_closed or live.failure is not None or all(s.end is not None for s in live.samples):
            return
        if live.resolved.deadline is not None and live.resolved.deadline <= now:
            self._expire(turn)
            return
        if turn.has_waited:
            pool.note_start(now)
            self.observe_wait(CLASSES[class_of(live.resolved.priority)], now - turn.queued_at)
        pool.queue.charge(turn.key, PROMPT_WEIGHT * len(live.resolved.prompt_token_ids))
        turn.has_begun = True
        pool.running.add(turn)
        for sample in live.samples:
            if not sample.finish_without_engine() and not self._place(sample):
                live.fail(no_engine())
                return

    def _pool(self, info: engine_pb.GetInfoResponse) -> Pool:
        """The artifact's pool. Idle ones go when a new one comes: without load there is nothing to be fair
        about.
        """
        name = (info.model_name, info.artifact_digest)
        pool = self._pools.get(name)
        if pool is None:
            self._pools = {known: other for known, other in self._pools.items() if not other.is_idle}
            pool = self._pools[name] = Pool(info, self._ageing_s)
        return pool

    @staticmethod
    def _check_deadline(live: LiveRequest, wait_s: float, now: float) -> None:
        deadline = live.resolved.deadline
        if deadline is not None and now + wait_s > deadline:
            raise StatusError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"about {wait_s:.1f} s of queue do not fit the deadline",
                reason="QUEUE_TOO_LONG",
            )

    def _expire(self, turn: Turn) -> None:
        """Its deadline came first."""
        turn.leave()
        self.num_expired += 1
        turn.live.fail(
            StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed while the request was queued")
        )

    def _miss_engines(self, pool: Pool, now: float) -> None:
        """No engine of the artifact is there: wait for one, but not for ever."""
        if pool.no_engine_since is None:
            pool.no_engine_since = now
        if now - pool.no_engine_since < self._wait_s:
            return
        pool.no_engine_since = None
        while (entry := pool.queue.pop(now)) is not None:
            entry.item.leave()
            entry.item.live.fail(no_engine())

    def _look_again(self) -> None:
        self._look = None
        self.pump()


def num_drawn(live: LiveRequest) -> int:
    """Output tokens that engines drew for a request, delivered or not."""
    return sum(len(sample.token_ids) for sample in live.samples)


def no_engine() -> StatusError:
    """UNAVAILABLE: nobody serves the artifact."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE, "no engine is ready", retry_after_s=1.0, reason="NO_ENGINE"
    )
