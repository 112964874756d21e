"""What a block costs the block manager, by how many others it keeps: it must not matter.

Two measures. Operations are the interpreter's instructions: the same in every run on any machine, but blind
to loops inside C. Time sees those too. Knows no tables and no goals.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from benchmarks.core_cases import BLOCKS_PER_DOCUMENT, document, fill
from services.engine.core.block_manager import BlockManager
from services.engine.core.sequence import SamplingParams, Sequence

NUM_REPEATS = 40


class Cost(NamedTuple):
    """The cost of one block: interpreter instructions, and processor time (the least of the repeats)."""

    operations: float
    seconds: float


def operations(work: Callable[[], object]) -> int:
    """How many interpreter instructions `work` executes."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


class Verbs:
    """The block manager's verbs over a cache of `num_cached` blocks, `num_free` others free."""

    def __init__(self, num_cached: int, block_size: int, num_free: int) -> None:
        self.blocks = BlockManager(num_cached + num_free, block_size)
        self.texts = fill(self.blocks, num_cached - num_cached % BLOCKS_PER_DOCUMENT)
        self._index = len(self.texts)

    def new(self, text: list[int]) -> Sequence:
        """A sequence of a text, one token longer so that all of the text can be cached."""
        return Sequence(None, [*text, 1], SamplingParams(max_tokens=1))

    def next_text(self) -> list[int]:
        """A text that nobody has computed."""
        self._index += 1
        return document(self._index, self.blocks.block_size)[::-1]

    def hit(self) -> Callable[[], object]:
        """Match a cached text."""
        sequence = self.new(self.texts[self._index % len(self.texts)])
        return lambda: self.blocks.match(sequence)

    def cycle(self) -> Callable[[], object]:
        """Match, take, compute and give back a cached text."""
        return self._cycle(self.texts[len(self.texts) // 2])

    def evict(self) -> Callable[[], object]:
        """The same for one that is new, where every block has to be taken from another text."""
        return self._cycle(self.next_text())

    def _cycle(self, text: list[int]) -> Callable[[], object]:
        sequence, blocks = self.new(text), self.blocks

        def work() -> None:
            copy = blocks.allocate(sequence, blocks.match(sequence))
            blocks.reserve(sequence, len(sequence))
            if copy is not None:
                blocks.finish_copy(copy)
            sequence.num_scheduled_tokens = sequence.num_computed_tokens = len(sequence)
            blocks.release(sequence)

        return work


def growth(num_cached: int, block_size: int) -> dict[str, Cost]:
    """Verb -> what it costs per block over a cache of so many blocks."""
    spare = 4 * BLOCKS_PER_DOCUMENT
    found = {}
    roomy, full = Verbs(num_cached, block_size, spare), Verbs(num_cached, block_size, 1)
    gc.collect()
    gc.freeze()
    for name, make in (("match", roomy.hit), ("share", roomy.cycle), ("evict", full.evict)):
        counts, times = [], []
        for _ in range(NUM_REPEATS):
            counts.append(operations(make()))
            work = make()
            began = time.thread_time()
            work()
            times.append(time.thread_time() - began)
        found[name] = Cost(
            sorted(counts)[len(counts) // 2] / BLOCKS_PER_DOCUMENT, min(times) / BLOCKS_PER_DOCUMENT
        )
    gc.unfreeze()
    return found
