"""What a decode step costs the host: the engine's loop and core over a runner that computes nothing.

    python -m benchmarks.core_host_time [--steps N] [--block-size N] [--device-ms MS] [--cpu-clock]

Two figures, each without what is spent inside the runner. `total`: all that the host does for a step.
`exposed`: from a step's tokens on the host to the next launch. Without overlap the device idles for so long;
with overlap it works on the step launched before, and idles only if that is shorter. With --device-ms the
runner pretends to a device that takes so long for a step, and the table says how long it idles between steps.
On a busy machine --cpu-clock counts the processor time of the engine's thread, not the time on the wall.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from typing import Any

from services.engine.core.admission import CoreLimits
from services.engine.core.batch import BlockCopy, Chunk, SampledToken
from services.engine.core.block_manager import BlockManager
from services.engine.core.engine_core import EngineCore
from services.engine.core.scheduler import Scheduler, SchedulerConfig
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.loop import GC_THRESHOLDS, EngineLoop, LinkEvents

BATCHES = (1, 64, 256, 1024)
MAX_PROMPT_TOKENS, MAX_MODEL_LEN, VOCABULARY = 135, 100_000, 1_000
NUM_WARM_STEPS = 20
TOKEN = SampledToken(7)


class NullRunner:
    """Computes nothing, and writes down when it is entered and left. `step_s`: how long its device takes."""

    def __init__(
        self, num_sequences: int, *, has_overlap: bool, step_s: float, clock: Callable[[], float]
    ) -> None:
        self.has_overlap = has_overlap
        self.clock = clock
        self.exposed_s: list[float] = []
        self.total_s: list[float] = []
        self.idle_s: list[float] = []
        self._num_sequences = num_sequences
        self._step_s = step_s
        self._free_at = self._left_launch = self._left_collect = 0.0
        self._is_steady = False
        self._exposed_s = self._idle_s = 0.0

    def prepare(self, chunk: Chunk) -> None:
        """Nothing to get ready."""

    def launch(
        self, chunks: SequenceABC[Chunk], copies: SequenceABC[BlockCopy]
    ) -> tuple[float, list[SampledToken]]:
        """(when the device will be done, the tokens)."""
        now = self.clock()
        self._is_steady = len(chunks) == self._num_sequences and chunks[0].length == chunks[-1].length == 1
        self._exposed_s = now - self._left_collect
        self._idle_s = max(0.0, now - self._free_at)
        self._free_at = max(now, self._free_at) + self._step_s
        launched = self._free_at, [TOKEN for chunk in chunks if chunk.is_sampling]
        self._left_launch = self.clock()
        return launched

    def collect(self, launched: tuple[float, list[SampledToken]]) -> list[SampledToken]:
        """The tokens, once the device is done."""
        now = self.clock()
        done_at, tokens = launched
        if self._is_steady:
            self.exposed_s.append(self._exposed_s)
            self.total_s.append(self._exposed_s + now - self._left_launch)
            self.idle_s.append(self._idle_s)
        if self._step_s and done_at > now:
            time.sleep(done_at - now)
        self._left_collect = self.clock()
        return tokens

    def forget(self, sequence: Sequence) -> None:
        """Nothing is held."""

    def is_device_fault(self, error: BaseException) -> bool:
        """There is no device."""
        return False


def run(num_sequences: int, args: argparse.Namespace, *, has_overlap: bool) -> NullRunner:
    """Decode `num_sequences` sequences for `args.steps` steps through a real loop; the runner's records."""
    clock = time.thread_time if args.cpu_clock else time.perf_counter
    runner = NullRunner(num_sequences, has_overlap=has_overlap, step_s=args.device_ms / 1000, clock=clock)
    length = MAX_PROMPT_TOKENS + args.steps + NUM_WARM_STEPS
    blocks = BlockManager(num_sequences * -(-length // args.block_size), args.block_size)
    config = SchedulerConfig(
        max_batch_size=num_sequences, max_batched_tokens=max(2048, MAX_PROMPT_TOKENS * num_sequences)
    )
    limits = CoreLimits(VOCABULARY, MAX_MODEL_LEN, max_queue_size=num_sequences)
    core = EngineCore(runner, Scheduler(config, blocks), blocks, limits)
    faults: list[BaseException] = []
    loop = EngineLoop(core, on_fault=faults.append)
    done, num_left = threading.Event(), num_sequences

    def deliver(events: LinkEvents) -> None:
        nonlocal num_left
        num_left -= len(events.finished)
        if not num_left:
            done.set()

    link_id = loop.open_link(deliver)
    for slot in range(num_sequences):
        # Of different lengths, so that they do not all need a block at the same step.
        num_tokens = 1 + slot * 37 % MAX_PROMPT_TOKENS
        prompt = [(slot * 7 + i * i) % VOCABULARY for i in range(num_tokens)]
        params = SamplingParams(max_tokens=args.steps + NUM_WARM_STEPS, seed=slot)
        loop.submit(link_id, slot, Sequence(None, prompt, params))
    loop.start()
    done.wait()
    loop.stop()
    if faults:
        raise faults[0]
    return runner


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """(median, 99th percentile) in microseconds, the first steps left out."""
    steady = sorted(seconds[NUM_WARM_STEPS:])
    return 1e6 * statistics.median(steady), 1e6 * steady[int(0.99 * (len(steady) - 1))]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--device-ms", type=float, default=0.0)
    parser.add_argument("--cpu-clock", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    args = parser.parse_args()
    gc.set_threshold(*GC_THRESHOLDS)  # As the engine's process does.
    print(f"{platform.machine()} {platform.python_implementation()} {platform.python_version()}", end="")
    print(f", blocks of {args.block_size}, {args.device_ms} ms on the device; microseconds per step")
    print("batch  mode      total p50      p99   exposed p50      p99   device idle p50      p99")
    for num_sequences in args.batches:
        for has_overlap in (False, True):
            found: Any = run(num_sequences, args, has_overlap=has_overlap)
            figures = [*quantiles(found.total_s), *quantiles(found.exposed_s), *quantiles(found.idle_s)]
            mode = "overlap" if has_overlap else "serial"
            total, total_p99, exposed, exposed_p99, idle, idle_p99 = figures
            print(
                f"{num_sequences:5d}  {mode:8s} {total:10.1f} {total_p99:8.1f} {exposed:13.1f}"
                f" {exposed_p99:8.1f} {idle:17.1f} {idle_p99:8.1f}"
            )


if __name__ == "__main__":
    main()
