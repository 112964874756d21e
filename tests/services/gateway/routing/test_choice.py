"""Which engine a sample goes to: exactness, trouble, room, affinity, load. Engines are only data here."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from services.gateway.links.breaker import CircuitBreaker
from services.gateway.links.engine_load import EngineLoad
from services.gateway.routing.choice import Choice
from services.gateway.routing.eligibility import candidates
from services.gateway.routing.prefixes import LENGTHS, Owner, PrefixMap, prefix_of
from services.gateway.streams.route import Route
from weft.v1 import engine_service_pb2 as engine_pb


def info(**fields: Any) -> engine_pb.GetInfoResponse:
    values = {"max_batch_size": 64, "max_queue_size": 64, "numerics_id": "cpu", "is_deterministic": True}
    return engine_pb.GetInfoResponse(**(values | fields))


@dataclass
class Engine:
    target: str
    info: engine_pb.GetInfoResponse = field(default_factory=info)
    num_live: int = 0
    session: int = 1
    is_silent: bool = False

    def __post_init__(self) -> None:
        self.load = EngineLoad(self.info)
        self.breaker = CircuitBreaker()

    @property
    def owner(self) -> Owner:
        return Owner(self.target, self.session)

    @property
    def num_active(self) -> int:
        return self.num_live

    def is_quiet(self, now: float) -> bool:
        return self.is_silent

    def beat(self, **fields: Any) -> None:
        self.load.beat(engine_pb.Heartbeat(**fields), self.num_live)


def sample(prompt: list[int] | None = None, *, session: str = "", emitted: int = 0, salt: str = "") -> Any:
    resolved = SimpleNamespace(
        prompt_token_ids=prompt or [1, 2, 3],
        cache_salt=salt,
        info=engine_pb.GetInfoResponse(artifact_digest="sha256:0"),
        session_id=session,
    )
    route = Route(numerics_id="cpu" if emitted else None)
    return SimpleNamespace(request=SimpleNamespace(resolved=resolved), token_ids=[7] * emitted, route=route)


def choice() -> Choice:
    return Choice(random.Random(3))


def test_the_emptier_engine_is_better_while_no_pace_is_known() -> None:
    busy, idle = Engine("a", num_live=5), Engine("b", num_live=4)
    assert all(choice().best(sample(), [busy, idle], 0.0) is idle for _ in range(10))


def test_load_of_other_gateways_counts() -> None:
    mine, others = Engine("a", num_live=5), Engine("b")
    others.beat(running=20)
    assert choice().best(sample(), [mine, others], 0.0) is mine


def test_the_shorter_prefill_is_better_than_the_emptier_engine() -> None:
    behind, ahead = Engine("a", num_live=1), Engine("b", num_live=8)
    behind.beat(running=1, waiting_tokens=8000, tokens_per_second=4000)
    ahead.beat(running=8, waiting_tokens=0, tokens_per_second=4000)
    assert choice().best(sample(), [behind, ahead], 0.0) is ahead
    # What was sent since the last heartbeat counts as well.
    ahead.load.sent(12_000)
    assert choice().best(sample(), [behind, ahead], 0.0) is behind


def test_a_slow_engine_gets_less() -> None:
    slow, fast = Engine("a", num_live=2), Engine("b", num_live=6)
    for engine, pace in ((slow, 500), (fast, 8000)):
        engine.beat(running=engine.num_live, tokens_per_second=pace)
    assert choice().best(sample(list(range(2000))), [slow, fast], 0.0) is fast


def test_a_full_batch_costs_the_time_until_a_place_comes_free() -> None:
    full, free = Engine("a", num_live=70), Engine("b", num_live=60)
    assert full.load.first_token_s(70, 0) > free.load.first_token_s(60, 0)
    assert choice().best(sample(), [full, free], 0.0) is free


def test_two_choices_do_not_herd() -> None:
    """Many choices on the same news: the emptiest of ten gets about a fifth, not all."""
    engines = [Engine(f"e{n}", num_live=n) for n in range(10)]
    chooser = choice()
    counts = Counter(chooser.best(sample(), engines, 0.0).target for _ in range(1000))
    assert counts["e0"] < 300
    assert counts["e9"] == 0


def test_a_prompt_goes_where_its_beginning_was() -> None:
    chooser, engines = choice(), [Engine("a"), Engine("b", num_live=2), Engine("c", num_live=2)]
    shared = list(range(500, 700))
    chooser.note(sample([*shared, 1, 2, 3]), engines[1].owner)
    for tail in range(20):
        assert chooser.best(sample([*shared, 9, tail]), engines, 0.0) is engines[1]
    assert chooser.counters["prefix"] == 20
    others = [chooser.best(sample([*shared], salt="of another"), engines, 0.0) for _ in range(20)]
    assert any(engine is not engines[1] for engine in others), "a salt keeps caches apart"


def test_the_longest_match_wins() -> None:
    prefixes = PrefixMap()
    long = list(range(3000))
    prefixes.add(prefix_of(long[:100], ""), Owner("short", 1))
    prefixes.add(prefix_of(long[:2000], ""), Owner("long", 1))
    assert prefixes.find(prefix_of(long, "")) == (Owner("long", 1), 1536)
    assert prefixes.find(prefix_of([*long[:40], 0, *long[41:]], "")) == (Owner("long", 1), 32)
    assert prefixes.find(prefix_of(long[:31], "")) is None
    assert prefixes.find(prefix_of(long, "salt")) is None


def test_the_prefix_map_is_bounded() -> None:
    prefixes = PrefixMap(max_entries=100)
    for n in range(200):
        prefixes.add(prefix_of([n] * 40, ""), Owner("a", 1))
    assert len(prefixes) == 100
    assert prefixes.find(prefix_of([0] * 40, "")) is None
    assert prefixes.find(prefix_of([199] * 40, "")) is not None
    assert len(prefix_of([1] * 100_000, "").hashes) == len(LENGTHS)


def test_an_engine_that_was_lost_has_nothing_cached() -> None:
    chooser, engines = choice(), [Engine("a"), Engine("b", num_live=3)]
    prompt = list(range(100))
    chooser.note(sample(prompt), engines[1].owner)
    assert chooser.best(sample(prompt), engines, 0.0) is engines[1]
    engines[1].session = 2
    assert chooser.best(sample(prompt), engines, 0.0) is engines[0]


def test_a_session_stays_before_a_prefix_does() -> None:
    chooser, engines = choice(), [Engine("a", num_live=2), Engine("b", num_live=2)]
    prompt = list(range(100))
    chooser.note(sample(prompt, session="s"), engines[0].owner)
    chooser.note(sample(prompt), engines[1].owner)
    assert chooser.best(sample(prompt, session="s"), engines, 0.0) is engines[0]
    assert chooser.best(sample(prompt), engines, 0.0) is engines[1]
    assert chooser.counters["session"] == chooser.counters["prefix"] == 1


def test_sessions_are_bounded() -> None:
    chooser = Choice(random.Random(1), max_sessions=10)
    for n in range(50):
        chooser.note(sample([n], session=f"s{n}"), Owner("a", 1))
    assert len(chooser._sessions) == 10


def test_affinity_ends_where_the_engine_is_much_busier() -> None:
    chooser, engines = choice(), [Engine("a"), Engine("b")]
    prompt = list(range(200))
    chooser.note(sample(prompt), engines[1].owner)
    engines[1].num_live = 8
    assert chooser.best(sample(prompt), engines, 0.0) is engines[1]
    engines[1].num_live = 9
    assert chooser.best(sample(prompt), engines, 0.0) is engines[0]
    # With a pace known, time decides: what is saved against what is waited for.
    for engine, waiting in ((engines[0], 0), (engines[1], 100)):
        engine.num_live = 1
        engine.beat(running=1, waiting_tokens=waiting, tokens_per_second=1000)
    assert chooser.best(sample(prompt), engines, 0.0) is engines[1]
    engines[1].beat(running=1, waiting_tokens=5000, tokens_per_second=1000)
    assert chooser.best(sample(prompt), engines, 0.0) is engines[0]
    assert chooser.counters["busy"] == 2
    engines[1].beat(running=64, waiting_tokens=0, tokens_per_second=1000)
    assert chooser.best(sample(prompt), engines, 0.0) is engines[0], "no place is free there"


def test_trouble_comes_after_load_and_exactness_before_all() -> None:
    tripped, silent, well = Engine("a"), Engine("b", is_silent=True), Engine("c", num_live=50)
    for _ in range(3):
        tripped.breaker.fail(0.0)
    assert choice().best(sample(), [tripped, silent, well], 0.0) is well
    assert choice().best(sample(), [tripped], 0.0) is tripped, "rather that than none"
    other = Engine("d", info=info(numerics_id="cuda"))
    assert choice().best(sample(emitted=5), [other, well], 0.0) is well
    assert choice().best(sample(), [other, well], 0.0) is other, (
        "without tokens there is nothing to differ from"
    )


def test_a_full_engine_is_the_last() -> None:
    full, free = Engine("a", num_live=128), Engine("b", num_live=127)
    assert choice().best(sample(), [full, free], 0.0) is free


def test_who_began_exactly_waits_for_such_engines_that_have_no_room() -> None:
    def link(target: str, numerics_id: str) -> Any:
        described = info(numerics_id=numerics_id, max_model_len=100, artifact_digest="sha256:0")
        return SimpleNamespace(target=target, is_usable=True, info=described)

    links = [link("exact", "cpu"), link("other", "cuda")]
    begun = sample(emitted=5)
    begun.request.resolved.sampling = SimpleNamespace(max_tokens=50)
    assert [link.target for link in candidates(begun, links, is_late=False)] == ["exact"]
    begun.route.refused_by = ("exact",)
    assert candidates(begun, links, is_late=False) == []
    assert [link.target for link in candidates(begun, links, is_late=True)] == ["other"]
    begun.request.resolved.sampling.max_tokens = 98
    assert candidates(begun, links, is_late=True) == [], "it must fit into the context"


def test_a_free_place_is_found_among_many_full_engines() -> None:
    full = [Engine(str(number), num_live=66) for number in range(7)]
    free = Engine("free", num_live=63)
    assert all(choice().best(sample(), [*full, free], 0.0) is free for _ in range(20))


def test_a_full_queue_is_full_however_empty_the_batch() -> None:
    """An engine short of blocks: its batch has places that it cannot fill."""
    engine = Engine("a", info=info(max_queue_size=4), num_live=8)
    engine.beat(running=4, waiting=3)
    assert not engine.load.is_full(8)
    engine.beat(running=4, waiting=4)
    assert engine.load.is_full(8)
    engine.load.freed(1.0)
    assert not engine.load.is_full(7), "who has waited takes its place"


def test_what_starts_at_once_needs_a_place_and_blocks() -> None:
    engine = Engine("a", info=info(block_size=16), num_live=4)
    assert engine.load.starts_at_once(4, 1000), "nothing is known yet"
    engine.beat(running=4, free_blocks=10)
    assert engine.load.starts_at_once(4, 159)
    assert not engine.load.starts_at_once(4, 160)
    engine.load.sent(100)
    assert not engine.load.starts_at_once(4, 60), "the blocks of what was sent since are counted"
    engine.beat(running=4, waiting=1, free_blocks=1000)
    assert not engine.load.starts_at_once(4, 10), "others wait there"
    engine.beat(running=64, free_blocks=1000)
    assert not engine.load.starts_at_once(64, 10)
