"""Where a sample goes: which artifact a request means, which engines serve it, and which of them is next.

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

from services.gateway.links.engine_client import EngineLink
from services.gateway.links.terms import LinkLost
from services.gateway.routing.choice import Choice, is_exact
from services.gateway.routing.eligibility import candidates, serves
from services.gateway.routing.failover import Failover
from services.gateway.routing.retry_budget import RetryBudget
from services.gateway.routing.served import Catalog, Served, is_of, no_engine
from services.gateway.routing.versions import VersionWeight
from services.gateway.streams.live import LiveSample
from weft.rpc.errors import StatusError
from weft.v1 import generation_pb2 as pb


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
        self._on_change = on_change
        self.failover = Failover(
            submit=self._submit,
            candidates=self._candidates,
            counters=self.counters,
            budget=self.budget,
            wait_s=wait_s,
            max_fruitless=max_fruitless,
        )
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
        """`find`, but a model whose engine was lost, or began to drain, a moment ago gets `wait_s` from then
        to come back: a new request is worth as much as one that was running. Never past `deadline`. Raises
        StatusError.
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
        """Until when an engine that was lost, or drains, may come back; 0 when there is none."""
        lost = (
            link.lost_at + self._wait_s
            for link in self.links
            if link.lost_at is not None and not link.is_usable and not link.is_leaving and is_wanted(link)
        )
        return max(lost, default=0.0)

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
            self.failover.wait(sample)
            return True
        return False

    def _submit(self, sample: LiveSample, links: list[EngineLink] | None = None) -> bool:
        """Send a sample to the best of these links, or of all that may take it. False when there is none."""
        links = self._candidates(sample) if links is None else links
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
        route.num_tokens_seen, route.seen_at = route.num_tokens_then, sample.request.now()
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
        """A sample's slot is gone."""
        self.failover.lost(sample, is_blamed=is_blamed)

    def on_refused(self, sample: LiveSample, failure: pb.Failure, target: str) -> None:
        """An engine has no room for a sample."""
        self.failover.refused(sample, failure, target)

    def on_link_change(self, link: EngineLink) -> None:
        """A link came up, went down, drains, or is left."""
        if link.is_usable:
            self.failover.retry_all()
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
        # Who was running comes before who wants to start.
        self.failover.retry_refused()
        for link in self.links:
            if link.is_up and not link.is_usable and link.num_live:
                self.failover.move_from(link)
        if any(link.load.starts_at_once(link.num_active, 0) for link in self.usable()):
            for link in self.usable():
                self.failover.relieve(link)
        for listener in self.room_listeners:
            listener()
