"""`python -m tools.chaos`: fault runs from the command line. Exit code 1 when anything was lost, doubled,
wrong or not given back; then the seed and the trace of the faults are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from cli.demo.processes import ServiceError
from tools.chaos.faults import WEIGHTS
from tools.chaos.plans import Plan, run_demo, run_mock
from tools.chaos.run import Report

RUNS = {"mock": run_mock, "demo": run_demo}
NUM_ENGINES = {"mock": 3, "demo": 2}
WHAT = {"mock": "mock engines", "demo": "engines with the demo model in float32"}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    default = Plan()
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__)
    parser.add_argument(
        "--engines", choices=("mock", "demo", "both"), default="both", help="both unless given"
    )
    parser.add_argument("--num-engines", type=int, help="how many (3 mock, 2 demo)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of requests and faults (1)")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="how long faults come (60)")
    parser.add_argument("--streams", type=int, default=default.num_streams, help="requests at once (64)")
    parser.add_argument("--step-ms", type=float, default=default.step_ms, help="a mock engine's step (20)")
    parser.add_argument("--num-blocks", type=int, default=default.num_blocks, help="of a mock engine (2048)")
    parser.add_argument("--only", choices=list(WEIGHTS), action="append", help="this kind of fault alone")
    parser.add_argument("--logs", type=Path, help="where the processes log; a temporary directory")
    return parser.parse_args(argv)


def run_one(name: str, arguments: argparse.Namespace, logs: Path) -> list[str]:
    """Run one of the two and print its report; what went wrong."""
    plan = Plan(
        seed=arguments.seed,
        seconds=arguments.seconds,
        num_streams=arguments.streams,
        num_engines=arguments.num_engines or NUM_ENGINES[name],
        step_ms=arguments.step_ms,
        num_blocks=arguments.num_blocks,
        kinds=tuple(arguments.only or ()),
    )
    print(f"{plan.num_engines} {WHAT[name]}", flush=True)
    try:
        report: Report = asyncio.run(RUNS[name](plan, logs / name))
    except (ServiceError, TimeoutError, ExceptionGroup) as error:
        reason = str(error) if isinstance(error, ServiceError) else repr(error)
        print(f"chaos: seed {plan.seed}: {reason}", file=sys.stderr)
        return [reason]
    print("\n".join(f"  {line}" for line in report.lines()), flush=True)
    return report.problems


def interrupt(number: int, frame: FrameType | None) -> None:
    """A SIGTERM leaves as a Ctrl-C does: with no process left behind."""
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    """Run; 0 when nothing was lost, doubled or wrong and everything is given back."""
    arguments = parse(argv)
    names = list(RUNS) if arguments.engines == "both" else [arguments.engines]
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="weft-chaos-") as temporary:
        for name in names:
            problems += run_one(name, arguments, arguments.logs or Path(temporary))
    return 1 if problems else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
