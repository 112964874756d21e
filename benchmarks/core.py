"""What a step costs the host: the engine's loop and core over a runner that computes nothing.

    python -m benchmarks.core [--only decode churn growth] [--rounds N] [--steps N] [--check FACTOR]

* decode: 64, 256 and 1,024 sequences that only decode, beside 100,000 cached blocks; microseconds of a step
  from launch to launch, with and without overlap, and where they go.
* churn: the same with sequences that end and come, half of them after cached texts, and no block free, so
  that every one that is taken is evicted; and for how long the garbage collector holds the thread up.
* growth: what one block costs to match, share and evict beside 1,000, 10,000 and 100,000 cached ones.

Time is the processor time of the engine's thread; --wall-clock takes the time on the wall. A busy machine
changes the first less. --check FACTOR exits 1 when a goal is missed by more
than that factor. --json FILE writes all figures, --append adds rows to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.core_cases import Case, Found, run
from benchmarks.core_growth import growth

GOALS_US = {64: 50.0, 256: 250.0, 1024: 1000.0}
"""Sequences -> what the host may take for a step of that many."""
PAUSE_GOAL_MS = 5.0
GROWTH_GOAL = 1.0
"""What a block may cost beside the most cached blocks, as a multiple of its cost beside the fewest."""
CACHED = (1_000, 10_000, 100_000)
PARTS = ("scheduler", "blocks", "core", "loop")
SECTIONS = ("decode", "churn", "growth")
MAX_TIME_GROWTH = 3.0
"""Time may grow so much before it counts: caches of the processor, and noise."""


def quantile(values: list[float], share: float) -> float:
    """The value that this share of `values` does not exceed."""
    return sorted(values)[round(share * (len(values) - 1))]


def microseconds(found: list[Found]) -> dict[str, float]:
    """min, p50, p99 and max over the steps of all rounds; each round's p50."""
    steps = [1e6 * seconds for each in found for seconds in each.steps_s]
    medians = [1e6 * statistics.median(each.steps_s) for each in found]
    return {
        "min": min(steps),
        "p50": statistics.median(medians),
        "p99": quantile(steps, 0.99),
        "max": max(steps),
        "p50_of_rounds": [round(value, 1) for value in medians],  # type: ignore[dict-item]
    }


def parts_of(found: Found) -> dict[str, float]:
    """Shares of a step: the scheduler without blocks, the blocks, the core's other work (executor, tokens
    taken in, events), the loop (events sorted by link and delivered).
    """
    parts = dict(found.parts_s or {})
    total = found.total_s
    core = parts["launch"] + parts["collect"] + parts["report"]
    return {
        "scheduler": (parts["schedule"] - parts["blocks"]) / total,
        "blocks": parts["blocks"] / total,
        "core": (core - parts["schedule"]) / total,
        "loop": max(0.0, 1 - core / total),
    }


def measure_steps(section: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per number of sequences and mode."""
    for num_running in args.running:
        for has_overlap in (False, True):
            case = Case(
                num_running,
                num_cached=args.cached,
                num_steps=args.steps,
                block_size=args.block_size,
                has_overlap=has_overlap,
                has_churn=section == "churn",
                has_cpu_clock=not args.wall_clock,
            )
            found = [run(case) for _ in range(args.rounds)]
            parts = parts_of(run(replace(case, has_parts=True)))
            pauses = {
                generation: [1e3 * s for each in found for s in each.pauses.seconds[generation]]
                for generation in range(3)
            }
            yield {
                "section": section,
                "running": num_running,
                "mode": "overlap" if has_overlap else "serial",
                "us": microseconds(found),
                "goal_us": GOALS_US.get(num_running) if section == "decode" else None,
                "parts": parts,
                "pauses": {str(generation): len(ms) for generation, ms in pauses.items()},
                "max_pause_ms": max((max(ms, default=0.0) for ms in pauses.values()), default=0.0),
                "steps": sum(len(each.steps_s) for each in found),
                "ended": sum(each.num_finished for each in found),
                "cached_share": statistics.mean(each.cached_share for each in found),
            }


def show_steps(record: dict[str, Any]) -> None:
    """One line of the table."""
    us, parts = record["us"], record["parts"]
    goal = "" if record["goal_us"] is None else f"{record['goal_us']:.0f}"
    split = " ".join(f"{100 * parts[name]:6.0f}" for name in PARTS)
    pauses = "/".join(str(count) for count in record["pauses"].values())
    print(
        f"{record['section']:7} {record['running']:5} {record['mode']:8} {goal:>5}"
        f" {us['min']:8.1f} {us['p50']:8.1f} {us['p99']:8.1f} {us['max']:9.1f}  {split}"
        f"   {pauses:>7} {record['max_pause_ms']:7.2f} {record['steps']:7} {record['ended']:6}",
        flush=True,
    )


def measure_growth(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per verb: its cost per block at each number of cached blocks."""
    found = {num_cached: growth(num_cached, args.block_size) for num_cached in args.growth}
    for verb in found[args.growth[0]]:
        costs = [found[num_cached][verb] for num_cached in args.growth]
        yield {
            "section": "growth",
            "verb": verb,
            "cached": list(args.growth),
            "operations": [cost.operations for cost in costs],
            "us": [1e6 * cost.seconds for cost in costs],
        }


def show_growth(record: dict[str, Any]) -> None:
    """One line of the table."""
    operations = " ".join(f"{value:9.1f}" for value in record["operations"])
    us = " ".join(f"{value:9.2f}" for value in record["us"])
    print(f"{record['verb']:7} {operations}   {us}", flush=True)


def missed(record: dict[str, Any], factor: float) -> Iterator[str]:
    """What in a record is beyond its goal by more than a factor."""
    if record["section"] == "growth":
        operations, us = record["operations"], record["us"]
        if operations[-1] > operations[0] * GROWTH_GOAL * 1.01:
            yield f"{record['verb']}: {operations[0]:.1f} operations per block grow to {operations[-1]:.1f}"
        if us[-1] > us[0] * MAX_TIME_GROWTH * factor:
            yield f"{record['verb']}: {us[0]:.2f} us per block grow to {us[-1]:.2f}"
        return
    name = f"{record['section']}, {record['running']} sequences, {record['mode']}"
    if record["goal_us"] is not None and record["us"]["p50"] > factor * record["goal_us"]:
        yield f"{name}: {record['us']['p50']:.0f} us, goal {record['goal_us']:.0f}"
    if record["max_pause_ms"] > factor * PAUSE_GOAL_MS:
        yield f"{name}: collector paused {record['max_pause_ms']:.1f} ms, goal {PAUSE_GOAL_MS:.0f}"


def csv_rows(records: list[dict[str, Any]], machine: str, sha: str) -> Iterator[tuple[object, ...]]:
    """Rows for benchmarks/results.csv."""
    for record in records:
        if record["section"] == "growth":
            for num_cached, us, count in zip(
                record["cached"], record["us"], record["operations"], strict=True
            ):
                case = f"{record['verb']} of a block, {num_cached} cached"
                yield "core", case, "us", f"{us:.2f}", "", "", "", "", "", machine, sha
                yield "core", case, "operations", f"{count:.1f}", "", "", "", "", "", machine, sha
            continue
        case = f"{record['section']} step, {record['running']} sequences, {record['mode']}"
        rounds, goal = record["us"]["p50_of_rounds"], record["goal_us"]
        p50 = record["us"]["p50"]
        ratio = ("goal", f"{goal:.0f}", f"{p50 / goal:.2f}") if goal else ("", "", "")
        spread = (f"{quantile(rounds, 0.2):.1f}", f"{quantile(rounds, 0.8):.1f}")
        yield "core", case, "us", f"{p50:.1f}", *spread, *ratio, machine, sha
        pause = record["max_pause_ms"]
        yield "core", f"{case}, longest pause", "ms", f"{pause:.2f}", "", "", "", "", "", machine, sha


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--running", type=int, nargs="+", default=list(GOALS_US))
    parser.add_argument("--cached", type=int, default=CACHED[-1])
    parser.add_argument("--growth", type=int, nargs="+", default=CACHED)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall-clock", action="store_true")
    parser.add_argument("--check", type=float, metavar="FACTOR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--append", action="store_true", help="add to results.csv")
    return parser.parse_args()


def main() -> int:
    """Measure, print, judge."""
    args = arguments()
    clock = "wall" if args.wall_clock else "cpu"
    machine = f"{platform.machine()} {os.cpu_count()} cores Python {platform.python_version()} {clock} clock"
    git = ("git", "rev-parse", "--short", "HEAD")
    sha = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    print(
        f"{machine}, blocks of {args.block_size}, {args.cached} cached, load {os.getloadavg()[0]:.1f}, {sha}"
    )
    records: list[dict[str, Any]] = []
    sections = [name for name in ("decode", "churn") if name in args.only]
    if sections:
        print(f"{'microseconds per step':>60} {'% of a step':>27} {'pauses of gc':>24}")
        print(
            "        seqs  mode      goal      min      p50      p99       max   sched blocks   core   loop  "
            " gen0/1/2  max ms   steps  ended"
        )
    for section in sections:
        for record in measure_steps(section, args):
            records.append(record)
            show_steps(record)
    if "growth" in args.only:
        heads = " ".join(f"{count:9}" for count in args.growth)
        print(f"\none block\ncached  {heads} operations {heads} us")
        for record in measure_growth(args):
            records.append(record)
            show_growth(record)
    load = os.getloadavg()[0]
    print(f"load at the end {load:.1f}")
    if args.json:
        figures = {"machine": machine, "git_sha": sha, "load": load, "records": records}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.append:
        results.append(csv_rows(records, machine, sha))
    failures = [text for record in records for text in missed(record, args.check or 0)] if args.check else []
    for text in failures:
        print(f"missed by more than {args.check:g} times: {text}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
