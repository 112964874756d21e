"""What a step may cost, counted in the interpreter's instructions: the same on every machine, however busy.

Instructions do not see loops inside C, so one test takes the time as well, with bounds that only a cost of
another order exceeds.
"""

from __future__ import annotations

import gc
import time

import pytest

from benchmarks.core_cases import fill
from benchmarks.core_growth import Verbs, operations
from services.engine.core.batch import Chunk, SampledToken
from services.engine.core.sequence import Sequence
from tests.services.engine.core.oracle import Clock, make_core, make_sequence

FEW, MANY, BLOCK_SIZE = 320, 6_400, 8
MAX_DECODE_OPERATIONS = 245
"""Of one sequence in one step of decodes, measured as 230 and 224."""


class NullRunner:
    """Draws 7 for everybody."""

    def __init__(self, has_overlap):
        self.has_overlap = has_overlap

    def prepare(self, chunk):
        """Nothing to get ready."""

    def launch(self, chunks, copies):
        return [SampledToken(7)] * sum(chunk.is_sampling for chunk in chunks)

    def collect(self, launched):
        return launched

    def forget(self, sequence):
        """Nothing is held."""

    def is_device_fault(self, error):
        return False


def decoding(num_running, *, num_cached=0, overlap=False, block_size=128, num_free=0):
    """A core that decodes, with so many blocks Cached beside."""
    num_blocks = num_cached + 8 * num_running + num_free
    core, _ = make_core(
        num_blocks,
        block_size,
        overlap=overlap,
        max_batch_size=num_running,
        max_batched_tokens=2 * num_running + 8192,
        prefill_chunk=8192,
        max_queue_size=num_running,
        clock=Clock(),
    )
    runner = NullRunner(overlap)
    core._runner = core._executor._runner = runner
    for i in range(num_cached // 16):
        core.add(make_sequence(("cached", i), [i % 97, *range(97)] * (16 * block_size // 98), max_tokens=1))
        core.step()
    while core.has_work():
        core.step()
    for i in range(num_running):
        core.add(make_sequence(i, [i % 97, 1 + i // 97], max_tokens=100))
    for _ in range(4):
        core.step()
    assert len(core.scheduler.running) == num_running
    return core


@pytest.mark.parametrize("overlap", [False, True], ids=["serial", "overlap"])
def test_a_step_of_decodes_costs_each_sequence_the_same(overlap):
    costs = {n: operations(decoding(n, overlap=overlap).step) for n in (1, 51, 201)}
    each = (costs[201] - costs[51]) / 150
    assert each == pytest.approx((costs[51] - costs[1]) / 50, rel=0.02), "not linear in the sequences"
    assert each <= MAX_DECODE_OPERATIONS


@pytest.mark.parametrize("overlap", [False, True], ids=["serial", "overlap"])
def test_what_ends_leaves_nothing_to_the_collector(overlap):
    """A circle of references is memory until the collector comes, and a pause when it does."""
    core = decoding(20, overlap=overlap)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        while core.num_live:
            if len(core.scheduler.running) == 20:
                core.cancel(7)
            core.step()
        core.settle()
        core.report()
        gc.collect()
        left = [found for found in gc.garbage if isinstance(found, Sequence | Chunk)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


def test_a_step_of_decodes_does_not_see_the_cached_blocks():
    few, many = (decoding(20, num_cached=n, block_size=8) for n in (FEW, MANY))
    assert many.blocks.counts().cached >= 4 * few.blocks.counts().cached > 0
    assert operations(many.step) == operations(few.step)


def test_nor_does_it_take_longer_beside_them():
    """What loops over them inside C is not counted above: 50,000 take it longer than all of the step."""
    best = []
    for num_cached in (500, 50_000):
        core = decoding(20, block_size=8, num_free=num_cached + 1_000)
        fill(core.blocks, num_cached)
        assert core.blocks.counts().cached >= num_cached
        times = []
        for _ in range(60):
            began = time.thread_time()
            core.step()
            times.append(time.thread_time() - began)
        best.append(min(times))
    assert best[1] < 3 * best[0]


@pytest.mark.parametrize("verb", ["hit", "cycle", "evict"])
def test_a_block_costs_the_same_whatever_else_is_cached(verb):
    costs = []
    for num_cached in (FEW, MANY):
        verbs = Verbs(num_cached, BLOCK_SIZE, 1 if verb == "evict" else 64)
        make = getattr(verbs, verb)
        make()()
        costs.append([operations(make()) for _ in range(9)])
    few, many = (sorted(counts)[4] for counts in costs)
    assert many <= 1.02 * few


@pytest.mark.parametrize("verb", ["hit", "cycle", "evict"])
def test_nor_does_it_take_longer(verb):
    """Twenty times as many blocks would take a loop over them twenty times as long."""
    best = []
    for num_cached in (FEW, MANY):
        verbs = Verbs(num_cached, BLOCK_SIZE, 1 if verb == "evict" else 64)
        times = []
        for _ in range(60):
            work = getattr(verbs, verb)()
            began = time.thread_time()
            work()
            times.append(time.thread_time() - began)
        best.append(min(times))
    assert best[1] < 5 * best[0]


def test_who_is_admitted_does_not_pay_for_those_who_decode():
    """A newcomer looks at the sequences that write behind its own prefix, not at all of them."""

    def cost(num_running):
        core = decoding(num_running + 2)
        core.cancel(0)
        core.cancel(1)
        core.add(make_sequence("first", [80, 81, 82, 83, 84], max_tokens=10))
        core.step()
        core.step()
        without = operations(core.step)
        core.add(make_sequence("new", [90, 91, 92, 93, 94], max_tokens=10))
        with_newcomer = operations(core.step)
        assert len(core.scheduler.running) == num_running + 2
        return with_newcomer - without

    each = (cost(200) - cost(20)) / 180
    assert each < 20, "to write one of them down takes two hundred"
