"""`python -m tools.chaos`: a fault run from the command line. Exit code 1 when anything was lost, doubled,
wrong or not given back; then the seed and the trace of the faults are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tools.chaos.faults import Schedule
from tools.chaos.run import Report, run
from tools.chaos.stack import Stack, mock_command
from tools.chaos.workload import Mix, Workload, load_vocabulary, mock_expect
from tools.demo.processes import ROOT, ServiceError

DEMO_MODEL = ROOT / "models" / "demo"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__)
    parser.add_argument(
        "--engines", choices=("mock", "demo"), default="mock", help="what is behind the gateway"
    )
    parser.add_argument("--num-engines", type=int, default=3, help="how many of them (3)")
    parser.add_argument("--seed", type=int, default=1, help="of requests and faults (1)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults come (60)")
    parser.add_argument("--streams", type=int, default=64, help="requests at once (64)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="a step of a mock engine (20)")
    parser.add_argument("--num-blocks", type=int, default=2048, help="blocks of a mock engine (2048)")
    parser.add_argument("--logs", type=Path, help="where the processes log; a temporary directory")
    return parser.parse_args(argv)


async def run_mock(arguments: argparse.Namespace, logs: Path) -> Report:
    """The run over mock engines."""
    flags = ["--step-ms", arguments.step_ms, "--num-blocks", arguments.num_blocks, "--hang-seconds", 5]
    command = mock_command(*flags, "--drain-seconds", 1, "--tokenizer", DEMO_MODEL)
    vocabulary = load_vocabulary(DEMO_MODEL)
    expect = mock_expect(vocabulary)
    gateway_flags = ["--tokenizer", DEMO_MODEL, "--log-level", "info"]
    async with Stack([command] * arguments.num_engines, logs, gateway_flags=gateway_flags) as stack:
        workloads = [
            Workload(arguments.seed, worker, Mix(), vocabulary, expect) for worker in range(arguments.streams)
        ]
        schedule = Schedule(stack.engines, arguments.seed)
        report = await run(stack, schedule, workloads, arguments.seconds, checks_logprobs=True)
        if report.problems:
            report.problems.append(stack.tails())
        report.problems += await stack.stop()
    return report


def main(argv: list[str]) -> int:
    """Run; 0 when nothing was lost, doubled or wrong and everything is given back."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(prefix="weft-chaos-") as temporary:
        logs = arguments.logs or Path(temporary)
        try:
            report = asyncio.run(run_mock(arguments, logs))
        except (ServiceError, ExceptionGroup) as error:
            print(f"chaos: seed {arguments.seed}: {error}", file=sys.stderr)
            return 1
    print("\n".join(report.lines()))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
