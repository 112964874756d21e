"""The order in which Cached blocks go: retained ones last, for as long as was asked, never more than half of
the pool, and never in the way of an allocation.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.engine.core.block import Block
from services.engine.core.eviction import EvictionOrder
from tests.services.engine.core.oracle import Clock, expected_output, make_core, make_sequence, output_of, run

SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


class Model:
    """What EvictionOrder promises, in the simplest form: a list, oldest first, searched from end to end."""

    def __init__(self, max_retained, clock):
        self.max_retained, self.clock, self.entries, self.looked_at = max_retained, clock, [], clock.time

    def add(self, index, until):
        self.entries.append([index, until if until > self.clock.time else 0.0])
        retained = [entry for entry in self.entries if entry[1]]
        if len(retained) > self.max_retained:
            retained[0][1] = 0.0

    def remove(self, index):
        self.entries = [entry for entry in self.entries if entry[0] != index]

    def evict(self):
        if self.clock.time - self.looked_at >= 1.0 and any(until for _, until in self.entries):
            self.looked_at = self.clock.time
            for entry in self.entries:
                if entry[1] <= self.clock.time:
                    entry[1] = 0.0
        chosen = next((e for e in self.entries if not e[1]), None) or self.entries[0]
        self.entries.remove(chosen)
        return chosen[0]


# Commands: 0 adds a block, 1 takes one back, 2 evicts, 3 lets time pass.
@SETTINGS
@given(st.integers(0, 6), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 999)), max_size=60))
def test_the_order_is_that_of_a_plain_list(max_retained, commands):
    clock = Clock()
    order, model = EvictionOrder(max_retained, clock), Model(max_retained, clock)
    blocks = {index: Block(index) for index in range(12)}
    inside = []
    for what, number in commands:
        outside = sorted(set(blocks) - set(inside))
        if what == 0 and outside:
            block = blocks[outside[number % len(outside)]]
            if number % 3:
                # One time for all: with several, the order among lapsed ones is only nearly that of use.
                order.retain([block], 5.0)
            order.add(block)
            model.add(block.index, block.retained_until)
            inside.append(block.index)
        elif what == 1 and inside:
            index = inside.pop(number % len(inside))
            order.remove(blocks[index])
            model.remove(index)
        elif what == 2 and inside:
            evicted = order.evict().index
            assert evicted == model.evict()
            inside.remove(evicted)
        elif what == 3:
            clock.time += number % 40 / 10
        assert sorted(order.checked()) == sorted(inside)
        assert len(order) == len(inside)


def play(core, key, prompt, retain_s=0.0, max_tokens=1):
    """Run one sequence to its end; how many of its tokens were cached."""
    sequence = make_sequence(key, prompt, max_tokens, retain_s=retain_s)
    core.add(sequence)
    tokens, ends = run(core)
    assert output_of(tokens, key) == expected_output(sequence)
    return ends[key].num_cached_tokens


def test_a_retained_conversation_outlives_what_came_after_it():
    for retain_s, expected in ((60.0, 11), (0.0, 0)):
        core, _ = make_core(num_blocks=16)
        first = list(range(12))
        play(core, "turn 1", first, retain_s)
        for number in range(20):
            play(core, number, [50 + number] * 12)
        assert play(core, "turn 2", first) == expected


def test_retention_ends_with_its_time():
    clock = Clock()
    core, _ = make_core(num_blocks=16, clock=clock)
    first = list(range(12))
    play(core, "turn 1", first, 60.0)
    clock.time += 61.0
    for number in range(20):
        play(core, number, [50 + number] * 12)
    assert play(core, "turn 2", first) == 0


def test_more_than_half_of_the_pool_is_not_retained_and_the_newest_stay():
    core, _ = make_core(num_blocks=16)
    for number in range(10):
        play(core, ("turn 1", number), [number] * 12, 60.0)
        core.check_integrity()
    assert core.blocks.num_retained == 8
    for number in range(20):
        play(core, number, [50 + number] * 12)
    hits = [play(core, ("turn 2", number), [number] * 12) for number in range(9, -1, -1)]
    assert hits[:2] == [11, 11]
    assert hits[-1] == 0


def test_the_head_of_a_conversation_outlives_its_tail():
    core, _ = make_core(num_blocks=16)
    long = list(range(50))
    play(core, "turn 1", long, 60.0)  # 13 blocks, of which 8 are retained
    for number in range(8):
        play(core, number, [60 + number] * 12)
    assert play(core, "turn 2", long) == 32


def test_retention_never_blocks_an_allocation():
    core, _ = make_core(num_blocks=8)
    play(core, "retained", list(range(14)), 1e6)
    assert core.blocks.num_available == 8
    assert play(core, "large", [70] * 30) == 0
    counts = core.blocks.counts()
    assert counts.free + counts.cached == 8
    core.check_integrity()


def test_what_is_not_sound_is_not_retained():
    core, runner = make_core(num_blocks=8)
    runner.fail["sample", "bad"] = ValueError("planted")
    core.add(make_sequence("bad", list(range(14)), retain_s=1e6))
    run(core)
    assert core.blocks.num_retained == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_turns_equal_a_stateless_run_whatever_is_evicted_between_them(seed, overlap):
    """Sessions as the engine sees them: each prompt is the last one, its output, and something new."""
    rng = random.Random(seed)
    clock = Clock()
    core, _ = make_core(num_blocks=24, clock=clock, overlap=overlap, max_batch_size=4)
    histories = {number: [rng.randrange(97)] for number in range(5)}
    num_cached = 0
    for turn in range(12):
        chosen = rng.sample(sorted(histories), 3)
        sequences = {}
        for number in chosen:
            prompt = histories[number] + [rng.randrange(97) for _ in range(rng.randint(1, 4))]
            sequences[number] = make_sequence(
                (turn, number), prompt, rng.randint(1, 4), retain_s=rng.choice((0.0, 2.0, 60.0))
            )
            core.add(sequences[number])
        core.add(make_sequence((turn, "noise"), [rng.randrange(97) for _ in range(rng.randint(1, 40))]))
        tokens, ends = run(core)
        for number, sequence in sequences.items():
            output = output_of(tokens, sequence.key)
            assert output == expected_output(sequence)
            num_cached += ends[sequence.key].num_cached_tokens
            histories[number] = sequence.prompt_token_ids + output
        clock.time += rng.random() * 3
        assert core.blocks.num_retained <= 12
    assert num_cached > 0
