"""Run the device lane: kernel tests, model parity, benchmarks, in order of worth, within a time limit.

    python -m tools.gpu [--dry] [--out DIR] [--minutes 8.8] [--only PHASE ...] [--write-results]

Needs torch, triton, numpy, transformers and pytest; installs nothing and asks no network. After every phase
DIR/results.json is complete up to there. Exit code 1 when a test, a parity check or a phase failed; a target
that is missed fails nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import results as csv_results
from tools.gpu.machine import machine_facts
from tools.gpu.phases import PHASES, PhaseResult, run_phase
from tools.gpu.report import number, table, write_json

MIN_SECONDS = 15
DRY_SECONDS = 150


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: no measurements")
    parser.add_argument("--out", type=Path, default=Path(".weft") / "gpu", help="where JSON and logs go")
    parser.add_argument("--minutes", type=float, default=8.8, help="for all phases together")
    parser.add_argument("--only", nargs="+", choices=[phase.name for phase in PHASES], metavar="PHASE")
    parser.add_argument("--git-sha", help="for a copy of the tree without its repository")
    parser.add_argument("--write-results", action="store_true", help="append to benchmarks/results.csv")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    give_up_at = time.monotonic() + 60 * arguments.minutes
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    machine = machine_facts(arguments.git_sha)
    if machine["device"] == "cpu" and not arguments.dry:
        print("torch sees no CUDA device. make gpu DRY=1 walks through on the CPU.", file=sys.stderr)
        return 2
    results: list[PhaseResult] = []
    for phase in PHASES:
        if arguments.only and phase.name not in arguments.only:
            continue
        left = give_up_at - time.monotonic()
        if left < MIN_SECONDS:
            results.append(PhaseResult(phase.name, "skipped", note="out of time"))
        else:
            print(f"{phase.name}: {phase.title}", flush=True)
            limit = DRY_SECONDS if arguments.dry else phase.seconds
            results.append(run_phase(phase, out, min(left, limit), arguments.dry))
        write_json(out / "results.json", machine, results, arguments.dry)
    print(table(results, machine, arguments.dry))
    print(f"{out / 'results.json'}")
    if arguments.write_results:
        print(_append(results, machine, arguments.dry))
    return int(any(result.outcome in ("failed", "timeout") for result in results))


def _append(results: list[PhaseResult], machine: dict[str, str], is_dry: bool) -> str:
    """Add what was measured to benchmarks/results.csv; refuses what is no measurement of a known commit."""
    if is_dry or machine["device"] == "cpu":
        return "nothing written to benchmarks/results.csv: these are no measurements of a device"
    if machine["git"] == "unknown":
        return "nothing written to benchmarks/results.csv: commit unknown, give --git-sha"
    where = f"{machine['device']} torch {machine['torch']} triton {machine['triton']}"
    rows = [
        _csv_row(row, where, machine["git"])
        for result in results
        for row in result.rows
        if row["status"] == "ok" and row["median"] is not None
    ]
    csv_results.append(rows)
    return f"{len(rows)} rows added to {csv_results.PATH.name}"


def _csv_row(row: dict[str, Any], where: str, git_sha: str) -> tuple[str, ...]:
    median, p20, p80, base, ratio = (
        number(row[key]).replace(",", "") for key in ("median", "p20", "p80", "baseline_median", "ratio")
    )
    name = f"gpu_{row['benchmark']}"
    return (name, row["case"], row["unit"], median, p20, p80, row["baseline"], base, ratio, where, git_sha)


if __name__ == "__main__":
    sys.exit(main())
