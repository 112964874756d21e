"""What becomes of a sample whose engine is lost, drains, is left, or has no room.

It keeps its prompt, its seed and every token it was given, so it goes on elsewhere where it stopped, or
waits. What this must not do is start a request that kills engines on all of them, or make restarts most of
the work. Which engine is next is not known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import grpc

from services.gateway.links.engine_client import EngineLink
from services.gateway.routing.choice import is_exact
from services.gateway.routing.retry_budget import RetryBudget
from services.gateway.routing.served import RETRY_S
from services.gateway.routing.waiting import WaitingRoom
from services.gateway.streams.live import LiveSample
from weft.rpc.errors import StatusError, error_from_failure
from weft.v1 import generation_pb2 as pb

# How often a sample that lost its engine asks one whose queue is full.
MIN_BUSY_S = 0.05
MAX_BUSY_S = 1.0
# So many new tokens, and what ended the engine was hardly this sample.
PROGRESS_TOKENS = 8
# Samples that are tried again at once when there is room.
MAX_RETRIES = 64
# A sample without a new token for so long, on an engine where some wait, is one of those.
STUCK_S = 1.0
_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


class Failover:
    """A sample whose engines died `max_fruitless` times in a row without its getting on is given up; one that
    finds no engine for `wait_s` too. `submit` sends a sample to the best of the links it is given, or of its
    `candidates`, if there are any.
    """

    def __init__(
        self,
        *,
        submit: Callable[..., bool],
        candidates: Callable[[LiveSample], list[EngineLink]],
        counters: Counter[str],
        budget: RetryBudget,
        wait_s: float,
        max_fruitless: int,
    ) -> None:
        self._submit = submit
        self._candidates = candidates
        self._counters = counters
        self._budget = budget
        self._wait_s = wait_s
        self._max_fruitless = max_fruitless
        self.waiting = WaitingRoom(wait_s, self._retry, self._give_up)

    def wait(self, sample: LiveSample) -> None:
        """The sample has no engine: it waits for one to come up."""
        self.waiting.add(sample, self._wait_s)

    def lost(self, sample: LiveSample, *, is_blamed: bool) -> None:
        """A sample's slot is gone. Go on elsewhere, wait for an engine, or end the request. `is_blamed`: the
        sample may be why.
        """
        route = sample.route
        if is_blamed:
            has_got_on = len(sample.token_ids) - route.num_tokens_then >= PROGRESS_TOKENS
            route.num_fruitless = 0 if has_got_on else route.num_fruitless + 1
            route.is_charged = True
        self._retry(sample)

    def refused(self, sample: LiveSample, failure: pb.Failure, target: str) -> None:
        """The engine at `target` has no room for a sample. Another may; if none has, it waits: it has passed
        the gateway's own door, and an engine that others have filled, or whose queue is short, is no reason
        to send it away.
        """
        route = sample.route
        route.num_placements -= 1  # it was not started
        if _is_over(sample):
            return
        route.refused_by = (*route.refused_by, target)
        route.refused_at = sample.request.now()
        route.refusal = failure
        if self._submit(sample):
            self._counters["rerouted"] += 1
        else:
            self._counters["busy"] += 1
            self.waiting.add(sample, min(max(failure.retry_after_ms / 1000, MIN_BUSY_S), MAX_BUSY_S))

    def retry_all(self) -> None:
        """An engine came up."""
        for sample in self.waiting.samples():
            self.waiting.remove(sample)
            self._retry(sample)

    def retry_refused(self) -> None:
        """An engine may have more room than before."""
        for sample in self.waiting.samples()[:MAX_RETRIES]:
            route = sample.route
            is_news = route.refused_by and sample.request.now() >= route.refused_at + MIN_BUSY_S
            if is_news and self._has_place(sample):
                self.waiting.remove(sample)
                self._retry(sample)

    def move_from(self, link: EngineLink) -> None:
        """Move what an engine that drains, or is left, still runs to others that have room; what they have
        none for stays until they do, or until the engine ends it.
        """
        for sample in link.samples():
            if _is_wanted(sample):
                others = [other for other in self._candidates(sample) if other.load.room(other.num_active)]
                self._move(sample, link, others)

    def relieve(self, link: EngineLink) -> None:
        """Move what waits on an engine, for a place or for blocks, to others that start it at once. Which of
        the samples that do not get on wait, only the engine knows: it says how many, and the youngest go
        first, since those are the last to start and the first to be preempted. Never where other tokens
        might be drawn.
        """
        num_waiting = link.load.num_waiting - link.num_paused
        for sample in reversed(link.samples() if num_waiting > 0 else []):
            now, num_tokens = sample.request.now(), len(sample.token_ids)
            is_stuck = sample.route.is_stuck(num_tokens, now, STUCK_S)
            if not is_stuck or sample.paused_at is not None or not _is_wanted(sample):
                continue
            num_tokens += len(sample.request.resolved.prompt_token_ids)
            others = [
                other
                for other in self._candidates(sample)
                if other is not link
                and other.load.starts_at_once(other.num_active, num_tokens)
                and other.breaker.allows(now)
                and not other.is_quiet(now)
                and is_exact(other, sample)
            ]
            num_waiting -= self._move(sample, link, others)
            if num_waiting <= 0:
                return

    def _move(self, sample: LiveSample, link: EngineLink, others: list[EngineLink]) -> bool:
        """Move a sample from its link to one of these, if there are any."""
        if not others:
            return False
        link.detach(sample)
        sample.link = None
        link.counters.moved_samples += 1
        self._counters["moves"] += 1
        if not self._submit(sample, others):
            self.wait(sample)
        return True

    def _has_place(self, sample: LiveSample) -> bool:
        """Whether an engine, one that had no room for the sample included, would now take it."""
        route = sample.route
        route.refused_by, refused_by = (), route.refused_by
        has_place = any(not link.load.is_full(link.num_live) for link in self._candidates(sample))
        route.refused_by = refused_by
        return has_place

    def _retry(self, sample: LiveSample) -> None:
        """Start the sample again after its last token, wait on, or end its request if that must not be."""
        request, route = sample.request, sample.route
        if _is_over(sample):
            return
        now = request.now()
        route.refused_by = ()
        if route.lost_at is not None and now > route.lost_at + self._wait_s:
            self._give_up(sample)
        elif request.resolved.deadline is not None and request.resolved.deadline <= now:
            sample.finish_at_deadline()
        elif route.num_fruitless >= self._max_fruitless:
            self._counters["poisonous"] += 1
            request.fail(_engine_lost("the engine was lost again and again"))
        elif route.is_charged and not self._budget.has_token(now):
            self._counters["out_of_budget"] += 1
            if self._candidates(sample):
                route.lost_at = None  # it waits for a token, not for an engine, and is not given up for that
            self.waiting.add(sample, min(MAX_BUSY_S, self._wait_s / 2))
        elif self._submit(sample):
            self._counters["replays"] += 1
            if route.is_charged:
                route.is_charged = False
                self._budget.take(now)
        else:
            self.wait(sample)

    def _give_up(self, sample: LiveSample) -> None:
        if _is_over(sample):
            return
        deadline = sample.request.resolved.deadline
        if deadline is not None and deadline - sample.request.now() < 0.1:
            sample.finish_at_deadline()
            return
        self._counters["given_up"] += 1
        refusal = sample.route.refusal
        if refusal is not None and refusal.code == _EXHAUSTED and not sample.is_accepted:
            sample.request.fail(error_from_failure(refusal))
        else:
            sample.request.fail(_engine_lost("the engine was lost and no other took the request"))


def _is_wanted(sample: LiveSample) -> bool:
    """Whether a sample that an engine has is to go on."""
    return not sample.is_cancelled and sample.end is None and sample.request.failure is None


def _is_over(sample: LiveSample) -> bool:
    request = sample.request
    return request.is_closed or request.failure is not None or sample.finish_without_engine()


def _engine_lost(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.UNAVAILABLE, message, retry_after_s=RETRY_S, reason="ENGINE_LOST")
