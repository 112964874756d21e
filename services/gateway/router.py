"""Where a sample goes, and what becomes of one whose engine is lost, drains, leaves, or has no room.

A sample keeps its prompt, its seed and every token it was given, so another engine of the same artifact, or
the same one after a restart, can go on where it stopped. Which of several engines is the Choice's matter,
which artifact the Catalog's. Knows nothing of clients.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import grpc

from services.gateway.choice import Choice, is_exact
from services.gateway.eligibility import candidates, serves
from services.gateway.engine_client import EngineLink
from services.gateway.link_terms import LinkLost
from services.gateway.live import LiveSample
from services.gateway.retry_budget import RetryBudget
from services.gateway.served import RETRY_S, Catalog, Served, is_of, no_engine
from services.gateway.versions import VersionWeight
from services.gateway.waiting import WaitingRoom
from weft.rpc.errors import StatusError, error_from_failure
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb

# How often a sample that lost its engine asks one whose queue is full.
MIN_BUSY_S = 0.05
MAX_BUSY_S = 1.0
# So many new tokens, and what ended the engine was hardly this sample.
PROGRESS_TOKENS = 8
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


class Router:
    """The links of this gateway. A sample whose engines died `max_fruitless` times in a row without its
    getting on is given up, so that it does not kill them all; `wait_s` is how long a lost one waits for an
    engine.
    """

    def __init__(
        self,
        *,
        wait_s: float,
        max_fruitless: int = 4,
        weights: Sequence[VersionWeight] = (),
        budget: RetryBudget | None = None,
        choice: Choice | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.links: Sequence[EngineLink] = ()
        self.catalog = Catalog(weights)
        self.choice = choice or Choice()
        self.budget = budget or RetryBudget()
        self.counters: Counter[str] = Counter(
            replays=0, moves=0, inexact=0, rerouted=0, busy=0, given_up=0, poisonous=0, out_of_budget=0
        )
        # Called, at most once per turn of the event loop, when an engine may have more room than before.
        self.room_listeners: list[Callable[[], None]] = []
        self._wait_s = wait_s
        self._max_fruitless = max_fruitless
        self._on_change = on_change
        self._waiting = WaitingRoom(wait_s, self._retry, self._give_up)
        self._changed = asyncio.Event()
        self._has_room_news = False

    # -- what there is ------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether at least one engine takes requests."""
        return any(link.is_usable for link in self.links)

    @property
    def wait_s(self) -> float:
        """How long what has lost its engine waits for another."""
        return self._wait_s

    @property
    def num_replays(self) -> int:
        """Samples that were started again."""
        return self.counters["replays"]

    def set_links(self, links: Sequence[EngineLink]) -> None:
        """These are all links now. One that is no more among them has nothing on it."""
        self.links = links
        self._changed.set()
        self._on_change()

    def usable(self) -> Iterable[EngineLink]:
        """Links that take new samples."""
        return (link for link in self.links if link.is_usable)

    def served(self) -> list[Served]:
        """Every model and version that can be used now."""
        return self.catalog.served(self.usable())

    def by_model(self) -> dict[str, Served]:
        """What each name that a request may give stands for: every model, and every model@version."""
        served = self.served()
        return {one.name: one for one in served} | {one.full_name: one for one in served}

    def find(self, model: str, key: str = "") -> Served:
        """The artifact for a model's name, or model@version; empty takes the only model there is. The same
        `key` gets the same version. Raises StatusError.
        """
        return self.catalog.find(model, key, self.usable(), self.links)

    async def find_soon(self, model: str, deadline: float | None, key: str = "") -> Served:
        """`find`, but a model whose engine was lost a moment ago gets `wait_s` from then to come back: a new
        request is worth as much as one that was running. Never past `deadline`. Raises StatusError.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                return self.find(model, key)
            except StatusError as error:
                until = self._awaited_until(lambda link: is_of(link, model))
                until = until if deadline is None else min(until, deadline)
                if error.code is not grpc.StatusCode.UNAVAILABLE or loop.time() >= until:
                    raise
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._changed.wait()

    def _awaited_until(self, is_wanted: Callable[[EngineLink], bool]) -> float:
        """Until when a lost engine may still come back; 0 when none was lost."""
        lost = (
            link.lost_at + self._wait_s
            for link in self.links
            if link.lost_at is not None and not link.is_up and not link.is_leaving and is_wanted(link)
        )
        return max(lost, default=0.0)

    def room(self, info: engine_pb.GetInfoResponse) -> int:
        """Sequences that engines of this artifact would start without queueing."""
        return sum(link.load.room(link.num_live) for link in self.usable() if serves(link, info))

    def unavailable(self) -> StatusError:
        """No engine can take a request now."""
        return no_engine()

    # -- placing ------------------------------------------------------------

    def place(self, sample: LiveSample) -> bool:
        """Start a sample, or start it again, on the best engine of its artifact. One whose engines were all
        lost a moment ago waits. False when there is none.
        """
        if self._submit(sample):
            self.budget.start()
            return True
        info = sample.request.resolved.info
        if self._awaited_until(lambda link: serves(link, info)) > sample.request.now():
            self._waiting.add(sample, self._wait_s)
            return True
        return False

    def _submit(self, sample: LiveSample, *, without: EngineLink | None = None) -> bool:
        links = [link for link in self._candidates(sample) if link is not without]
        now = sample.request.now()
        while links:
            link = self.choice.best(sample, links, now)
            try:
                link.submit(sample)
            except LinkLost:
                links.remove(link)
                continue
            self._note(sample, link)
            return True
        return False

    def _candidates(self, sample: LiveSample) -> list[EngineLink]:
        route = sample.route
        is_late = route.lost_at is not None and sample.request.now() - route.lost_at > self._wait_s / 2
        return candidates(sample, self.links, is_late=is_late)

    def _note(self, sample: LiveSample, link: EngineLink) -> None:
        """The sample was sent."""
        route, info = sample.route, link.info
        route.num_placements += 1
        route.num_tokens_then = len(sample.token_ids)
        if info is None:
            return
        if not is_exact(link, sample):
            self.counters["inexact"] += 1
            route.numerics_id = None
        elif not sample.token_ids:
            route.numerics_id = info.numerics_id if info.is_deterministic else None
        if len(self.links) > 1:
            self.choice.note(sample, link.owner)

    # -- what links report ------------------------------------------------------------

    def on_lost(self, sample: LiveSample, *, is_blamed: bool) -> None:
        """A sample's slot is gone. Go on elsewhere, wait for an engine, or end the request."""
        route = sample.route
        route.refused_by = ()
        if is_blamed:
            has_got_on = len(sample.token_ids) - route.num_tokens_then >= PROGRESS_TOKENS
            route.num_fruitless = 0 if has_got_on else route.num_fruitless + 1
            route.is_charged = True
        self._retry(sample)

    def on_refused(self, sample: LiveSample, failure: pb.Failure, target: str) -> None:
        """An engine has no room for a sample. Another may; if none has, one that was admitted before tries
        again instead of being refused in the middle of its text, and so does one that met the beginning of a
        drain.
        """
        route = sample.route
        route.num_placements -= 1  # it was not started
        if self._is_over(sample):
            return
        route.refused_by = (*route.refused_by, target)
        if self._submit(sample):
            self.counters["rerouted"] += 1
        elif sample.is_accepted or failure.code == _UNAVAILABLE:
            self.counters["busy"] += 1
            retry_s = min(max(failure.retry_after_ms / 1000, MIN_BUSY_S), MAX_BUSY_S)
            self._waiting.add(sample, retry_s)
        else:
            sample.request.fail(error_from_failure(failure))

    def on_link_change(self, link: EngineLink) -> None:
        """A link came up, went down, drains, or is left."""
        if link.is_usable:
            for sample in self._waiting.samples():
                self._waiting.remove(sample)
                self._retry(sample)
        self.on_room(link)
        self._changed.set()
        self._on_change()

    def on_room(self, link: EngineLink) -> None:
        """An engine may have more room than before."""
        if not self._has_room_news:
            self._has_room_news = True
            asyncio.get_running_loop().call_soon(self._tell_room)

    def _tell_room(self) -> None:
        self._has_room_news = False
        for link in self.links:
            if link.is_up and not link.is_usable and link.num_live:
                self._move_from(link)
        for listener in self.room_listeners:
            listener()

    def _move_from(self, link: EngineLink) -> None:
        """Move what an engine that drains, or is left, still runs to others that have room; what they have
        none for stays until they do, or until the engine ends it.
        """
        for sample in link.samples():
            request = sample.request
            if sample.is_cancelled or sample.end is not None or request.failure is not None:
                continue
            if not any(other.load.room(other.num_live) for other in self._candidates(sample)):
                continue
            link.detach(sample)
            sample.link = None
            link.counters.moved_samples += 1
            self.counters["moves"] += 1
            if not self._submit(sample):
                self._waiting.add(sample, self._wait_s)

    # -- again ------------------------------------------------------------

    def _retry(self, sample: LiveSample) -> None:
        """Start the sample again after its last token, wait on, or end its request if that must not be."""
        request, route = sample.request, sample.route
        if self._is_over(sample):
            return
        now = request.now()
        route.refused_by = ()
        if request.resolved.deadline is not None and request.resolved.deadline <= now:
            sample.finish_at_deadline()
        elif route.num_fruitless >= self._max_fruitless:
            self.counters["poisonous"] += 1
            request.fail(_engine_lost("the engine was lost again and again"))
        elif route.is_charged and not self.budget.has_token(now):
            self.counters["out_of_budget"] += 1
            self._waiting.add(sample, MAX_BUSY_S)
        elif self._submit(sample):
            self.counters["replays"] += 1
            if route.is_charged:
                route.is_charged = False
                self.budget.take(now)
        else:
            self._waiting.add(sample, self._wait_s)

    def _give_up(self, sample: LiveSample) -> None:
        if self._is_over(sample):
            return
        deadline = sample.request.resolved.deadline
        if deadline is not None and deadline - sample.request.now() < 0.1:
            sample.finish_at_deadline()
        else:
            self.counters["given_up"] += 1
            sample.request.fail(_engine_lost("the engine was lost and no other took the request"))

    @staticmethod
    def _is_over(sample: LiveSample) -> bool:
        request = sample.request
        return request.is_closed or request.failure is not None or sample.finish_without_engine()


def _engine_lost(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.UNAVAILABLE, message, retry_after_s=RETRY_S, reason="ENGINE_LOST")
