"""The order of the queue against a plain model of it, and what it promises: nobody starves, shares are as the
weights, nothing is held back.
"""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission.fair_queue import (
    CLASSES,
    MAX_IDLE_KEYS,
    OVERDUE_EVERY,
    Entry,
    FairQueue,
    KeyQueue,
    class_of,
)

AGEING_S = 10.0


class PlainQueue:
    """The same order, found by looking at everything each time."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.waiting: list[tuple[int, float, int, str, float]] = []  # number, arrival, rank, key, cost
        self.last: str | None = None
        self.starts = 0

    def push(self, number: int, key: str, rank: int, cost: float, now: float) -> None:
        own = self.counters.setdefault(key, 0.0)
        if not any(w[2] == rank and w[3] == key for w in self.waiting):
            others = [self.counters[w[3]] for w in self.waiting if w[2] == rank]
            if others:
                own = max(own, min(others))
            elif self.last is not None:
                own = max(own, self.counters[self.last])
            self.counters[key] = own
        self.waiting.append((number, now, rank, key, cost))

    def pop(self, now: float) -> int | None:
        if not self.waiting:
            return None
        rank = min(w[2] for w in self.waiting)
        oldest = [min(w for w in self.waiting if w[2] == r) for r in {w[2] for w in self.waiting} - {rank}]
        overdue = [w for w in oldest if w[1] <= now - AGEING_S]
        self.starts += 1
        if overdue and self.starts >= OVERDUE_EVERY:
            self.starts = 0
            rank = min(overdue)[2]
        chosen = min((w for w in self.waiting if w[2] == rank), key=lambda w: (self.counters[w[3]], w[0]))
        self.waiting.remove(chosen)
        self.counters[chosen[3]] += chosen[4]
        self.last = chosen[3]
        return chosen[0]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abcd"), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("pop"), st.just(""), st.just(0), st.just(0)),
        st.tuples(st.just("remove"), st.just(""), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("charge"), st.sampled_from("abcd"), st.just(0), st.integers(1, 9)),
        st.tuples(st.just("wait"), st.just(""), st.just(0), st.integers(1, 8)),
    ),
    max_size=120,
)


@given(ACTIONS)
def test_the_order_is_that_of_the_plain_queue(actions: list[tuple[str, str, int, int]]) -> None:
    queue: FairQueue[int] = FairQueue(ageing_s=AGEING_S)
    plain = PlainQueue()
    entries: dict[int, Entry[int]] = {}
    numbers = itertools.count()
    costs: dict[int, int] = {}
    now = 0.0
    for action, key, which, amount in actions:
        if action == "push":
            number = next(numbers)
            plain.push(number, key, which, amount, now)
            costs[number] = amount
            entries[number] = queue.push(number, queue.key(key), rank=which, now=now)
        elif action == "pop":
            expected = plain.pop(now)
            found = queue.pop(now)
            assert (found.item if found is not None else None) == expected
            if found is not None:
                queue.charge(found.key, costs[found.item])
        elif action == "remove" and entries:
            number = sorted(entries)[which % len(entries)]
            queue.remove(entries[number])
            plain.waiting = [w for w in plain.waiting if w[0] != number]
        elif action == "charge" and key in plain.counters:
            plain.counters[key] += amount
            queue.charge(queue.key(key), amount)
        elif action == "wait":
            now += amount
        assert len(queue) == len(plain.waiting)
        for rank in range(3):
            assert queue.num_queued(rank) == sum(w[2] == rank for w in plain.waiting)
    while (expected := plain.pop(now)) is not None:
        found = queue.pop(now)
        assert found is not None
        assert found.item == expected
        queue.charge(found.key, costs[found.item])
    assert queue.pop(now) is None


def test_ties_go_by_arrival() -> None:
    queue: FairQueue[int] = FairQueue()
    for number, key in enumerate("cabcab"):
        queue.push(number, queue.key(key), rank=1, now=0.0)
    order = [queue.pop(0.0) for _ in range(6)]
    assert [entry.item for entry in order if entry is not None] == list(range(6))


def test_classes_of_priorities() -> None:
    assert [CLASSES[class_of(p)] for p in (-100, -1, 0, 1, 100)] == [
        "interactive",
        "interactive",
        "normal",
        "batch",
        "batch",
    ]


class Server:
    """Serves a queue in slots: each step every running request gets one token."""

    def __init__(self, queue: FairQueue[tuple[str, int, int]], num_slots: int) -> None:
        self.queue = queue
        self.num_slots = num_slots
        self.running: list[tuple[KeyQueue[Any], list[int]]] = []
        self.service: dict[str, float] = {}
        self.now = 0.0
        self.started: list[Any] = []

    def fill(self) -> None:
        while len(self.running) < self.num_slots and (entry := self.queue.pop(self.now)) is not None:
            name, cost, length = entry.item
            self.queue.charge(entry.key, cost)
            self.service[name] = self.service.get(name, 0.0) + cost
            self.running.append((entry.key, [length, 0]))
            self.started.append(entry)

    def step(self) -> None:
        self.now += 0.05
        for key, progress in self.running:
            progress[1] += 1
            self.queue.charge(key, 2.0)
            assert key.name is not None
            self.service[key.name] += 2.0
        self.running = [pair for pair in self.running if pair[1][1] < pair[1][0]]


@given(
    st.integers(0, 2**32),
    st.integers(1, 8),
    st.sampled_from([(1.0, 1.0), (1.0, 3.0), (2.0, 0.5)]),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_the_service_of_two_keys_that_keep_waiting_stays_within_the_papers_bound(
    seed: int, num_slots: int, weights: tuple[float, float], longest_prompt: int, longest_output: int
) -> None:
    draw = random.Random(seed)
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    server = Server(queue, num_slots)
    by_name = dict(zip("ab", weights, strict=True))
    bound = 2 * max(longest_prompt, 2 * num_slots * longest_output) / min(weights)
    for _ in range(200):
        for name, weight in by_name.items():
            key = queue.key(name, weight)
            while key.lanes[1].num_queued <= num_slots:
                cost = draw.randint(1, longest_prompt)
                item = (name, cost, draw.randint(1, longest_output))
                queue.push(item, key, rank=1, now=server.now)
        server.fill()
        assert len(server.running) == num_slots, "a slot stood empty while requests waited"
        server.step()
        shares = [server.service.get(name, 0.0) / weight for name, weight in by_name.items()]
        assert abs(shares[0] - shares[1]) <= bound


def test_ten_times_the_load_gets_no_more_than_its_share() -> None:
    draw = random.Random(1)
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    server = Server(queue, 16)
    for _ in range(6000):
        for name, load in (("heavy", 10), ("light", 1)):
            for _ in range(load if draw.random() < 0.35 else 0):
                item = (name, draw.randint(1, 30), draw.randint(5, 15))
                queue.push(item, queue.key(name), rank=1, now=server.now)
        server.fill()
        server.step()
    heavy, light = server.service["heavy"], server.service["light"]
    # The light key asks for less than half: it gets all it asks for, the heavy one the rest.
    assert queue.key("light").lanes[1].num_queued < 20
    assert queue.key("heavy").lanes[1].num_queued > 1000
    assert light < heavy


def test_a_key_that_was_idle_has_saved_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    busy, idle = queue.key("busy"), queue.key("idle")
    queue.push("first", busy, rank=1, now=0.0)
    queue.pop(0.0)
    queue.charge(busy, 1000)
    for number in range(6):
        queue.push(f"busy{number}", busy, rank=1, now=0.0)
    for number in range(6):
        queue.push(f"idle{number}", idle, rank=1, now=0.0)
    order = []
    while (entry := queue.pop(0.0)) is not None:
        order.append(entry.item)
        queue.charge(entry.key, 10)
    assert [item.rstrip("012345") for item in order] == ["busy", "idle"] * 6


def test_a_class_gets_its_part_while_better_ones_never_end() -> None:
    queue: FairQueue[str] = FairQueue(ageing_s=AGEING_S)
    batch = [queue.push("batch", queue.key("b"), rank=2, now=0.0) for _ in range(20)]
    normal = queue.push("normal", queue.key("n"), rank=1, now=1.0)
    now, started = 1.0, 0
    while batch[-1].is_queued or normal.is_queued:
        while queue.num_queued(0) < 3:
            queue.push("interactive", queue.key("i"), rank=0, now=now)
        now += 0.1
        entry = queue.pop(now)
        assert entry is not None
        if now < AGEING_S:
            assert entry.rank == 0
        started += 1
        assert started < 1000, "somebody starves"
    assert started == pytest.approx(90 + 21 * OVERDUE_EVERY, abs=10)


def test_one_key_in_a_crowd_of_newcomers_is_served() -> None:
    queue: FairQueue[str] = FairQueue()
    old = queue.key("old")
    queue.charge(old, 500)
    entry = queue.push("old", old, rank=1, now=0.0)
    for number in itertools.count():
        for _ in range(2):
            name = f"k{random.Random(number).randrange(100)}"
            queue.push(name, queue.key(name), rank=1, now=0.0)
        popped = queue.pop(0.0)
        assert popped is not None
        if popped is entry:
            break
        queue.charge(popped.key, 10)
        assert number < 20_000, "it starves"


def test_memory_is_bounded_by_who_waits() -> None:
    queue: FairQueue[int] = FairQueue()
    stays = queue.push(0, queue.key("stays"), rank=2, now=0.0)
    for number in range(5 * MAX_IDLE_KEYS):
        key = queue.key("stays" if number % 2 else f"k{number}")
        queue.remove(queue.push(number, key, rank=2, now=0.0))
    assert len(queue) == 1
    assert len(queue._keys) <= MAX_IDLE_KEYS
    assert len(stays.key.lanes[2].entries) < 100
    assert len(queue._classes[2].entries) < 100
    assert len(queue._orders[2]) <= MAX_IDLE_KEYS
    queue.pop(0.0)
    assert queue.pop(0.0) is None


def test_how_many_are_before() -> None:
    queue: FairQueue[int] = FairQueue()
    heavy, light = queue.key("heavy"), queue.key("light")
    for number in range(50):
        queue.push(number, heavy, rank=1, now=0.0)
    assert queue.num_before(light, 1) == 1
    assert queue.num_before(heavy, 1) == 50
    assert queue.num_before(light, 0) == 0
    assert queue.num_before(light, 2) == 50


def test_a_start_costs_microseconds_with_hundreds_of_keys_waiting() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(512):
        queue.push(number, queue.key(f"k{number % 256}"), rank=1, now=0.0)
    begin = time.perf_counter()
    for number in range(2000):
        entry = queue.pop(0.0)
        assert entry is not None
        queue.charge(entry.key, number % 50)
        queue.push(number, entry.key, rank=1, now=0.0)
    assert (time.perf_counter() - begin) / 2000 < 500e-6
