"""Of what a step of the engine on a CPU consists: shares of its time, and torch's operators.

    python -m benchmarks.cpu_profile [--threads N] [--clock cpu] [--quick] [--torch]

Takes the weights of `make bench-cpu` (run it first; --quick for the tiny model). Shares are of times taken
where the model calls `ops`, each less what it calls in turn, without a profiler, whose cost would fall on the
many small operators; --torch adds torch.profiler's table of a few more steps. Knows the engine's parts;
compares with nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cpu_engine import System
from benchmarks.cpu_machine import machine, physical_cores
from benchmarks.cpu_process import ROOT
from benchmarks.cpu_shape import CLOCKS, QUICK, TINY, TINYLLAMA, WORKLOAD, Dimensions, Workload, folder_name
from services.engine.kernels import ops

DOORS = {
    "paged_attention": "attention",
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "rotary_write_kv": "rotary, cache write",
    "linear_silu_mul": "silu",
    "silu_mul": "silu",
    "embedding": "embedding, rows",
    "gather_rows": "embedding, rows",
}
"""Operations of `ops` and the part of a step that their own time belongs to."""

PARTS = (
    "linears", "head", "attention", "norms", "rotary, cache write", "silu", "embedding, rows", "sampling",
    "forward, the rest", "core",
)  # fmt: skip


class Clock:
    """Seconds by part; a part's calls of other parts are not counted as its own."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.seconds: Counter[str] = Counter()
        self._inner: list[float] = []

    def timed(self, part: str | Callable[..., str], work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, timed. `part` may be a function of the first argument."""

        @functools.wraps(work)
        def call(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            began = self._now()
            try:
                return work(*arguments, **named)
            finally:
                seconds = self._now() - began
                inner = self._inner.pop()
                self.seconds[part if isinstance(part, str) else part(arguments[0])] += seconds - inner
                if self._inner:
                    self._inner[-1] += seconds

        return call

    def clear(self) -> None:
        self.seconds.clear()


@contextmanager
def clocked(core: Any, runner: Any, now: Callable[[], float]) -> Iterator[Clock]:
    """Within, every step's time goes to its parts."""
    clock = Clock(now)
    head = runner.model.head
    kinds = {type(linear) for linear in runner.model.linears.values()}
    replaced: list[tuple[Any, str, Any]] = []

    def replace(holder: Any, name: str, part: str | Callable[..., str]) -> None:
        before = getattr(holder, name)
        replaced.append((holder, name, before))
        setattr(holder, name, clock.timed(part, before))

    for name, part in DOORS.items():
        replace(ops, name, part)
    for kind in kinds:
        replace(kind, "__call__", lambda linear: "head" if linear is head else "linears")
    replace(runner, "forward", "forward, the rest")
    replace(runner, "sample", "sampling")
    replace(core, "step", "core")
    try:
        yield clock
    finally:
        for holder, name, before in reversed(replaced):
            setattr(holder, name, before)


def shares(
    system: System, dimensions: Dimensions, workload: Workload, repeats: int, now: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """By case: milliseconds of a step by part."""
    found = {}
    with clocked(system.core, system.runner, now) as clock:
        for case in workload.cases:
            times = []
            for number in range(repeats + 1):
                clock.clear()
                steps = _run(system, case, dimensions, workload, 1000 + number)
                times.append({part: clock.seconds[part] / steps * 1e3 for part in PARTS})
            # The first warms up. Of the others the middle one, whole: medians of parts would not add up.
            ordered = sorted(times[1:], key=lambda parts: sum(parts.values()))
            found[case] = ordered[len(ordered) // 2]
    return found


def _run(system: System, case: str, dimensions: Dimensions, workload: Workload, number: int) -> int:
    """One run of a case; returns its steps."""
    kind, size = case.split()
    if kind == "prefill":
        system.prefill(workload.prefill_prompt(dimensions.vocab_size, number))
        return 1
    steps = dict(workload.steps)[int(size)]
    system.decode(int(size), 0, steps)
    return steps + 1  # the one that ends the sequences is like the others


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each part."""
    rows = [f"| ms of a step | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for part in PARTS:
        cells = [f"{parts[part]:.2f} ({parts[part] / sum(parts.values()):.0%})" for parts in found.values()]
        rows.append(f"| {part} | {' | '.join(cells)} |")
    rows.append(f"| all | {' | '.join(f'{sum(parts.values()):.2f}' for parts in found.values())} |")
    return "\n".join(rows)


def operators(system: System, case: str, dimensions: Dimensions, workload: Workload) -> str:
    """torch.profiler's table of one run of a case, the dozen operators that take longest themselves."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _run(system, case, dimensions, workload, 2000)
    return profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=44
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--repeats", type=int, default=5, help="runs of each case; the middle one is told")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: processor time")
    parser.add_argument("--quick", action="store_true", help="the tiny model")
    parser.add_argument("--torch", action="store_true", help="torch.profiler's tables as well")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".weft" / "bench-cpu", help="where weights are kept"
    )
    options = parser.parse_args()
    dimensions, workload = (TINY, QUICK) if options.quick else (TINYLLAMA, WORKLOAD)
    folder = options.work / folder_name(dimensions, workload)
    if not folder.exists():
        print(f"bench-cpu: {folder} is missing: make bench-cpu writes it", file=sys.stderr)
        return 1
    system = System(folder, dimensions, workload, options.threads, {})
    system.fill(workload.prompts(dimensions.vocab_size))
    print(machine(options.threads), "\n")
    print(table(shares(system, dimensions, workload, options.repeats, CLOCKS[options.clock])))
    if options.torch:
        for case in workload.cases:
            print(f"\n{case}\n{operators(system, case, dimensions, workload)}")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
