"""Which of several engines a sample goes to. Knows loads and where prompts were seen; sends nothing.

Where the sample can go on bit for bit first, then where nothing is wrong, then where there is room. Among
those the engine that served its session last, or has seen the longest beginning of its prompt, unless that
one is much busier; else the better of two drawn at random (Mitzenmacher, "The power of two choices in
randomized load balancing", 2001) by the estimated time to the first token.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Protocol, TypeVar

from services.gateway.links.breaker import CircuitBreaker
from services.gateway.links.engine_load import EngineLoad
from services.gateway.routing.prefixes import Owner, PrefixMap, prefix_of
from services.gateway.streams.live import LiveSample
from weft.v1 import engine_service_pb2 as engine_pb

MAX_SESSIONS = 1 << 16
# Affinity may cost so much more time to the first token than the best other engine, besides what it saves.
SLACK_S = 0.1
# Estimates that differ by less, in seconds or as a share, are the same; then the emptier engine is better.
SAME_S = 0.05
SAME_SHARE = 0.2
# Steps that differ by less say more about the moment than about the engine.
SLOW_STEP_S = 0.25
# While no pace is known: so many sequences more than the other, and twice as many.
SLACK_SEQUENCES = 8


class Candidate(Protocol):
    """What is asked of a link."""

    @property
    def target(self) -> str:
        """Where the engine is."""

    @property
    def owner(self) -> Owner:
        """The engine in its present life."""

    @property
    def info(self) -> engine_pb.GetInfoResponse | None:
        """What the engine said of itself."""

    @property
    def load(self) -> EngineLoad:
        """How busy it is."""

    @property
    def num_live(self) -> int:
        """Slots of this gateway."""

    @property
    def num_active(self) -> int:
        """Of these, slots that are not paused."""

    @property
    def breaker(self) -> CircuitBreaker:
        """Whether it is to be left alone."""

    def is_quiet(self, now: float) -> bool:
        """Whether it ought to have been heard and was not."""


C = TypeVar("C", bound=Candidate)


class Choice:
    """Remembers where sessions and prompts went. `counters` says how often what decided."""

    def __init__(self, rng: random.Random | None = None, *, max_sessions: int = MAX_SESSIONS) -> None:
        self.counters: Counter[str] = Counter(session=0, prefix=0, load=0, busy=0)
        self._rng = rng or random.Random()
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, Owner] = OrderedDict()
        self._prefixes = PrefixMap()

    def best(self, sample: LiveSample, links: Sequence[C], now: float) -> C:
        """The link for a sample; `links` are those that may take it, at least one."""
        ranks = [_rank(link, sample, now) for link in links]
        first = min(ranks)
        pool = [link for link, rank in zip(links, ranks, strict=True) if rank == first]
        if len(pool) == 1:
            return pool[0]
        num_tokens = _num_tokens(sample)
        by_load = self._lighter(pool, num_tokens)
        known, num_known, why = self._known(sample, pool)
        if known is None:
            self.counters["load"] += 1
            return by_load
        if known is not by_load and _is_much_busier(known, by_load, num_tokens, num_known):
            self.counters["busy"] += 1
            return by_load
        self.counters[why] += 1
        return known

    def note(self, sample: LiveSample, owner: Owner) -> None:
        """The sample went there."""
        resolved = sample.request.resolved
        self._prefixes.add(prefix_of(resolved.prompt_token_ids, _salt(sample)), owner)
        if session_id := _session_of(sample):
            self._sessions[session_id] = owner
            self._sessions.move_to_end(session_id)
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)

    def _lighter(self, pool: list[C], num_tokens: int) -> C:
        """The better of two; of those with a free place in the batch, if there are any."""
        free = [link for link in pool if link.load.room(link.num_active)] or pool
        if len(free) == 1:
            return free[0]
        one, other = self._rng.sample(free, 2)
        one_s = one.load.first_token_s(one.num_active, num_tokens)
        other_s = other.load.first_token_s(other.num_active, num_tokens)
        steps = one.load.step_s, other.load.step_s
        if min(steps) > 0.0 and abs(steps[0] - steps[1]) > SLOW_STEP_S:
            one_s, other_s = one_s + steps[0], other_s + steps[1]
        if abs(one_s - other_s) > max(SAME_S, SAME_SHARE * min(one_s, other_s)):
            return one if one_s < other_s else other
        return one if _occupancy(one) <= _occupancy(other) else other

    def _known(self, sample: LiveSample, pool: list[C]) -> tuple[C | None, int, str]:
        """Who has most of it cached, how many tokens that may be, and why that is thought."""
        prompt = sample.request.resolved.prompt_token_ids
        owner = self._sessions.get(_session_of(sample))
        if (link := _of_owner(pool, owner)) is not None:
            return link, len(prompt), "session"
        found = self._prefixes.find(prefix_of(prompt, _salt(sample)))
        if found is not None and (link := _of_owner(pool, found[0])) is not None:
            return link, found[1], "prefix"
        return None, 0, ""


def _occupancy(link: Candidate) -> tuple[float, int]:
    num_there = link.load.num_sequences(link.num_active)
    return num_there / link.load.max_batch_size, num_there


def _of_owner(pool: list[C], owner: Owner | None) -> C | None:
    return next((link for link in pool if link.owner == owner), None) if owner is not None else None


def _rank(link: Candidate, sample: LiveSample, now: float) -> tuple[bool, bool, bool]:
    """What is wrong with a link, worst first."""
    has_trouble = not link.breaker.allows(now) or link.is_quiet(now)
    return not is_exact(link, sample), has_trouble, link.load.is_full(link.num_live)


def is_exact(link: Candidate, sample: LiveSample) -> bool:
    """Whether the engine would draw the very tokens that the one before would have drawn. One without tokens
    yet has nothing to differ from.
    """
    info = link.info
    if not sample.token_ids or info is None:
        return True
    return info.is_deterministic and info.numerics_id == sample.route.numerics_id


def _is_much_busier(known: Candidate, other: Candidate, num_tokens: int, num_known: int) -> bool:
    """Whether the tokens that need not be computed there cost more time than they save."""
    there, here = known.load, other.load
    if there.room(known.num_active) == 0 and here.room(other.num_active) > 0:
        return True
    if not there.tokens_per_second:
        ours, others = there.num_sequences(known.num_active), here.num_sequences(other.num_active)
        return ours > 2 * others + SLACK_SEQUENCES
    num_new = max(0, num_tokens - num_known)
    known_s = there.first_token_s(known.num_active, num_new)
    return known_s > here.first_token_s(other.num_active, num_tokens) + SLACK_S


def _num_tokens(sample: LiveSample) -> int:
    return len(sample.request.resolved.prompt_token_ids) + len(sample.token_ids)


def _session_of(sample: LiveSample) -> str:
    return sample.request.resolved.session_id


def _salt(sample: LiveSample) -> tuple[str, str]:
    resolved = sample.request.resolved
    return resolved.cache_salt, resolved.info.artifact_digest
