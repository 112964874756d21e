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

from services.gateway.admission.fair_queue import CLASSES, class_of
from services.gateway.admission.pool import Pool, Prefill, Turn
from services.gateway.routing.places import Places
from services.gateway.streams.live import LiveRequest, LiveSample
from weft.rpc.auth import Caller
from weft.rpc.errors import StatusError
from weft.v1 import engine_service_pb2 as engine_pb

# While somebody waits, the queue is looked at so often, in case whoever had room did not say so.
LOOK_S = 0.25


class Waiting(NamedTuple):
    """One line of the statistics."""

    model: str
    priority: str
    num_requests: int


class Dispatcher:
    """Starts requests. `find_places` says what the engines of an artifact take now, None when there is no
    such engine; `place` starts a sample. A queued request whose artifact has had no engine
    for `wait_s` fails. `pump` is to be called whenever there may be more room.
    """

    def __init__(
        self,
        find_places: Callable[[engine_pb.GetInfoResponse], Places | None],
        place: Callable[[LiveSample], bool],
        *,
        wait_s: float = 15.0,
        ageing_s: float = 10.0,
    ) -> None:
        self.num_queued_ever = 0
        self.num_expired = 0
        # Seconds in the queue of those that had to wait, by class.
        self.observe_wait: Callable[[str, float], None] = lambda priority, seconds: None
        self._find_places = find_places
        self._place = place
        self._wait_s = wait_s
        self._ageing_s = ageing_s
        self._pools: dict[tuple[str, str, str], Pool] = {}
        self._look: asyncio.TimerHandle | None = None
        self._is_pump_due = False

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
        places = self._find_places(pool.info)
        must_wait = len(pool.queue) > 0 or places is None or not pool.has_room(places)
        if must_wait:
            self._check_deadline(live, pool.wait_s(key, rank), now)
            pool.settle(now)
        if not len(pool.queue):
            pool.no_engine_since = None  # of those who waited before
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
        self._is_pump_due = False
        now = asyncio.get_running_loop().time()
        for pool in list(self._pools.values()):
            if len(pool.queue):
                self._pump(pool, now)

    def _pump(self, pool: Pool, now: float) -> None:
        queue = pool.queue
        while len(queue):
            places = self._find_places(pool.info)
            if places is None:
                self._miss_engines(pool, now)
                break
            pool.no_engine_since = None
            if not pool.has_room(places):
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
        live.on_first_token = self._at_first_token(pool, pool.begin(turn), live.on_first_token)
        for sample in live.samples:
            if not sample.finish_without_engine() and not self._place(sample):
                live.fail(no_engine())
                return

    def _pool(self, info: engine_pb.GetInfoResponse) -> Pool:
        """The artifact's pool. Idle ones go when a new one comes: without load there is nothing to be fair
        about.
        """
        name = (info.model_name, info.artifact_version, info.artifact_digest)
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
            turn = entry.item
            turn.leave()
            turn.live.fail(no_engine())

    def _at_first_token(self, pool: Pool, prefill: Prefill, notify: Callable[[], None]) -> Callable[[], None]:
        """What is to be done then, besides `notify`. Refers to nothing of the request, which keeps it."""

        def on_first_token() -> None:
            notify()
            prefill.end()
            if len(pool.queue):
                self._pump_soon()

        return on_first_token

    def _pump_soon(self) -> None:
        """Once this turn of the event loop is over, however many first tokens it brings."""
        if not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self.pump)

    def _look_again(self) -> None:
        self._look = None
        self.pump()


def no_engine() -> StatusError:
    """UNAVAILABLE: nobody serves the artifact."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE, "no engine is ready", retry_after_s=1.0, reason="NO_ENGINE"
    )
