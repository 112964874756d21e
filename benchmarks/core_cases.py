"""What `benchmarks.core` times: the engine's loop and core over a runner that computes nothing.

A case is so many running sequences over a block manager full of cached blocks. Everything runs as it does in
the engine's process: on the loop's own thread, with the collector's thresholds, and what was made before the
start out of its sight. Knows no tables and no goals.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceABC
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from services.engine.core.admission import CoreLimits
from services.engine.core.batch import BlockCopy, Chunk, SampledToken
from services.engine.core.block import TOKEN_TYPECODE
from services.engine.core.block_manager import BlockManager
from services.engine.core.engine_core import EngineCore
from services.engine.core.scheduler import Scheduler, SchedulerConfig
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.loop import GC_THRESHOLDS, EngineLoop, LinkEvents

VOCABULARY, MAX_MODEL_LEN = 32_000, 100_000
BLOCKS_PER_DOCUMENT, BLOCKS_IN_COMMON = 16, 4
DOCUMENTS_PER_FAMILY = 8
NUM_WARM_STEPS = 50
TOKEN = SampledToken(7)

Clock = Callable[[], float]
BLOCK_VERBS = ("match", "allocate", "reserve", "record", "release", "finish_copy")


_NOISE = random.Random(7).choices(range(VOCABULARY), k=100_003)


def document(index: int, block_size: int, num_blocks: int = BLOCKS_PER_DOCUMENT) -> list[int]:
    """Token ids of a cached text. The texts of a family begin with the same BLOCKS_IN_COMMON blocks."""
    num_common = BLOCKS_IN_COMMON * block_size
    return _noise(index // DOCUMENTS_PER_FAMILY, num_common) + _noise(
        -1 - index, num_blocks * block_size - num_common
    )


def _noise(seed: int, length: int) -> list[int]:
    start = seed * 7919 % (len(_NOISE) - length)
    return _NOISE[start : start + length]


def fill(blocks: BlockManager, num_blocks: int) -> list[list[int]]:
    """Compute texts until `num_blocks` blocks are Cached; the texts, oldest first."""
    texts: list[list[int]] = []
    while blocks.counts().cached < num_blocks:
        text = document(len(texts), blocks.block_size)
        hold(blocks, text)
        texts.append(text)
    return texts


def hold(blocks: BlockManager, text: list[int]) -> None:
    """All that a text's way through the block manager asks of it: matched, allocated, computed, released."""
    sequence = Sequence(None, text, SamplingParams(max_tokens=1))
    copy = blocks.allocate(sequence, blocks.match(sequence))
    blocks.reserve(sequence, len(text))
    if copy is not None:
        blocks.finish_copy(copy)
    sequence.num_scheduled_tokens = sequence.num_computed_tokens = len(text)
    blocks.release(sequence)


class NullRunner:
    """Computes nothing. Writes down when it is entered: from one launch to the next is a step of the host.
    `at_launch` is told how many launches there were before.
    """

    def __init__(self, clock: Clock, *, has_overlap: bool, at_launch: Callable[[int], None]) -> None:
        self.has_overlap = has_overlap
        self.launched_at = array("d")
        self.num_chunks = array(TOKEN_TYPECODE)
        self._clock = clock
        self._at_launch = at_launch

    def prepare(self, chunk: Chunk) -> None:
        """Nothing to get ready."""

    def launch(self, chunks: SequenceABC[Chunk], copies: SequenceABC[BlockCopy]) -> list[SampledToken]:
        """The tokens, at once."""
        self._at_launch(len(self.launched_at))
        self.launched_at.append(self._clock())
        self.num_chunks.append(len(chunks))
        return [TOKEN for chunk in chunks if chunk.is_sampling]

    def collect(self, launched: list[SampledToken]) -> list[SampledToken]:
        """The tokens."""
        return launched

    def forget(self, sequence: Sequence) -> None:
        """Nothing is held."""

    def is_device_fault(self, error: BaseException) -> bool:
        """There is no device."""
        return False


@dataclass
class Pauses:
    """How long the garbage collector held the loop's thread up: seconds, by generation."""

    seconds: dict[int, list[float]] = field(default_factory=lambda: {0: [], 1: [], 2: []})

    @contextmanager
    def watched(self, clock: Clock) -> Iterator[None]:
        """Time every collection meanwhile."""
        began = 0.0

        def note(phase: str, info: dict[str, Any]) -> None:
            nonlocal began
            if phase == "start":
                began = clock()
            else:
                self.seconds[info["generation"]].append(clock() - began)

        gc.callbacks.append(note)
        try:
            yield
        finally:
            gc.callbacks.remove(note)


class Parts:
    """Time inside the scheduler, the block manager, and all of the core. Measuring it costs time itself, so
    a run with parts is not one for totals.
    """

    def __init__(self, clock: Clock) -> None:
        self.seconds = dict.fromkeys(("blocks", "schedule", "launch", "collect", "report"), 0.0)
        self._clock = clock
        self._is_on = self._is_in_blocks = False

    def switch(self, is_on: bool) -> None:
        """Count from here, or no more."""
        self._is_on = is_on

    def watch(self, core: EngineCore) -> None:
        """Wrap the verbs of a core."""
        for name in BLOCK_VERBS:
            self._wrap(core.blocks, name, "blocks")
        self._wrap(core.scheduler, "schedule", "schedule")
        for name in ("launch", "collect", "report"):
            self._wrap(core, name, name)

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        verb, clock, is_block = getattr(owner, name), self._clock, part == "blocks"

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_in_blocks:
                return verb(*args, **kwargs)  # One verb calls another.
            self._is_in_blocks = is_block
            began = clock()
            try:
                return verb(*args, **kwargs)
            finally:
                self.seconds[part] += (clock() - began) * self._is_on
                if is_block:
                    self._is_in_blocks = False

        setattr(owner, name, timed)


@dataclass
class Found:
    """What a run shows, in seconds: warm steps, the pauses of the collector, the parts of `total_s` seconds
    of steps if they were watched. `cached_share`: of the prompt tokens, those that were cached.
    """

    steps_s: list[float]
    pauses: Pauses
    total_s: float
    num_cached: int
    num_finished: int
    cached_share: float
    parts_s: dict[str, float] | None = None


@dataclass(frozen=True)
class Case:
    """How many sequences run over how many cached blocks, and for how long. `has_churn`: sequences end and
    new ones come, half of them after a cached text, into a cache without a free block; else all only decode.
    """

    num_running: int
    num_cached: int = 100_000
    num_steps: int = 1000
    block_size: int = 128
    has_overlap: bool = False
    has_churn: bool = False
    has_parts: bool = False
    has_cpu_clock: bool = True


class Load:
    """The sequences of a case: those that begin it, and one more for each that ends."""

    def __init__(self, case: Case, texts: list[list[int]]) -> None:
        self._case = case
        self._random = random.Random(7)
        self._texts = texts
        num_spare = case.num_running * case.num_steps // 100 if case.has_churn else 0
        self.first = [self._make(is_first=True) for _ in range(case.num_running)]
        self.spare = [self._make() for _ in range(num_spare)]

    def _make(self, *, is_first: bool = False) -> Sequence:
        case, rng = self._case, self._random
        num_own = rng.randint(1, 4 * case.block_size)
        prompt = rng.choices(range(VOCABULARY), k=num_own)
        if not case.has_churn:
            return Sequence(None, prompt, SamplingParams(max_tokens=case.num_steps + NUM_WARM_STEPS))
        if rng.random() < 0.5:
            prompt = rng.choice(self._texts)[: rng.randint(1, 16 * case.block_size)] + prompt
        max_tokens = rng.randint(1, 400) if is_first else rng.randint(50, 400)
        return Sequence(None, prompt, SamplingParams(max_tokens=max_tokens))


def make_core(case: Case, runner: NullRunner) -> tuple[EngineCore, Load]:
    """A core with the case's cache, and its sequences."""
    length = 4 * case.block_size + case.num_steps + NUM_WARM_STEPS
    if case.has_churn:
        length = 20 * case.block_size + 400
    num_active = case.num_running * -(-length // case.block_size)
    num_blocks = case.num_cached + (0 if case.has_churn else num_active)
    blocks = BlockManager(num_blocks, case.block_size)
    texts = fill(blocks, case.num_cached - case.num_cached % BLOCKS_PER_DOCUMENT - BLOCKS_PER_DOCUMENT)
    config = SchedulerConfig(
        max_batch_size=case.num_running,
        max_batched_tokens=case.num_running + 2048
        if case.has_churn
        else 4 * case.block_size * case.num_running,
    )
    limits = CoreLimits(VOCABULARY, MAX_MODEL_LEN, max_queue_size=case.num_running)
    return EngineCore(runner, Scheduler(config, blocks), blocks, limits), Load(case, texts)


def run(case: Case) -> Found:
    """Run a case on a loop. Raises whatever the loop's thread died of."""
    clock = time.thread_time if case.has_cpu_clock else time.perf_counter
    parts, pauses = Parts(clock), Pauses()

    def at_launch(num_before: int) -> None:
        if case.has_parts:
            parts.switch(0 <= num_before - NUM_WARM_STEPS < case.num_steps)

    runner = NullRunner(clock, has_overlap=case.has_overlap, at_launch=at_launch)
    core, load = make_core(case, runner)
    if case.has_parts:
        parts.watch(core)
    faults: list[BaseException] = []
    over = threading.Event()
    loop = EngineLoop(core, on_fault=lambda error: (faults.append(error), over.set())[0])
    slots = iter(range(1 << 30))
    num_left = case.num_running

    def deliver(events: LinkEvents) -> None:
        nonlocal num_left
        if events.rejected:
            raise events.rejected[0][1]
        for _ in events.finished:
            if load.spare:
                loop.submit(link_id, next(slots), load.spare.pop())
            else:
                num_left -= 1
        if not num_left or (case.has_churn and len(runner.launched_at) >= case.num_steps + NUM_WARM_STEPS):
            over.set()

    link_id = loop.open_link(deliver)
    for sequence in load.first:
        loop.submit(link_id, next(slots), sequence)
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    before = core.report()
    try:
        with pauses.watched(clock):
            loop.start()
            over.wait()
            after = loop.load()
            loop.stop()
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    if faults:
        raise faults[0]
    counters = after.counters
    return Found(
        steps_s=_steps(case, runner),
        pauses=pauses,
        total_s=_total(case, runner),
        num_cached=before.blocks.cached,
        num_finished=counters.ended,
        cached_share=counters.cache_hits / max(1, counters.cache_queries),
        parts_s=parts.seconds if case.has_parts else None,
    )


def _steps(case: Case, runner: NullRunner) -> list[float]:
    """The time of each step whose batch was whole, warm ones only."""
    times, sizes = runner.launched_at, runner.num_chunks
    return [
        times[i + 1] - times[i]
        for i in range(NUM_WARM_STEPS, min(len(times) - 1, case.num_steps + NUM_WARM_STEPS))
        if sizes[i] >= 0.9 * case.num_running
    ]


def _total(case: Case, runner: NullRunner) -> float:
    times = runner.launched_at
    return times[min(len(times) - 1, NUM_WARM_STEPS + case.num_steps)] - times[NUM_WARM_STEPS]
