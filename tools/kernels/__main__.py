"""Compile every kernel launch for sm_80, sm_90 and sm_100 without a GPU, print what the machine code says,
fail where it breaks a gate.

    python -m tools.kernels [--only w4a16] [--arch 90] [--details] [--listing DIR] [--json FILE] [FILE.py ...]

The main loop is the longest innermost loop with a tensor-core instruction; instructions per element count one
pass of it for all threads of a program, over the weights or K and V values that the pass handles.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import triton

from tools.kernels.cases import find_cases
from tools.kernels.gates import MULTIPROCESSORS, failures
from tools.kernels.pool import compile_all
from tools.kernels.report import details, row, table, write_json

CACHE = Path(".weft") / "kernels"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="*", help="modules or files to look in; default: the kernel package")
    parser.add_argument("--only", default="", help="compile the cases with this in their name")
    parser.add_argument("--first", action="store_true", help="only the first of each module's launches")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(MULTIPROCESSORS))
    parser.add_argument("--json", type=Path, help="write all facts here")
    parser.add_argument("--listing", type=Path, help="write disassembly and PTX into this directory")
    parser.add_argument("--details", action="store_true", help="print loops and opcodes")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--cache", type=Path, default=CACHE, help="where results are kept")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: interpreted kernels have no machine code. Unset it.", file=sys.stderr)
        return 2
    began = time.monotonic()
    found = find_cases(arguments.sources)
    for failure in found.failures:
        print(f"FAIL {failure}", file=sys.stderr)
    entries = [entry for entry in found.entries if arguments.only in entry.case.name]
    if arguments.first:
        entries = list({entry.module: entry for entry in reversed(entries)}.values())[::-1]
    archs = sorted(set(arguments.arch or MULTIPROCESSORS))
    jobs = [
        (index, arch)
        for index, entry in enumerate(entries)
        for arch in archs
        if entry.archs is None or arch in entry.archs
    ]
    if not jobs:
        print(f"no case to compile among {len(found.entries)}", file=sys.stderr)
        return 1
    by_job = compile_all(entries, jobs, arguments.jobs, arguments.cache, arguments.listing)
    results = [(entries[job[0]], by_job[job]) for job in jobs]
    print(table([row(*result) for result in results], arguments.markdown))
    if arguments.details:
        print("\n".join(details(facts) for _, facts in results if not facts.error and not facts.skipped))
    if arguments.json:
        write_json(arguments.json, results, triton.__version__)
    broken = [(facts, why) for entry, facts in results if (why := failures(entry.case, facts))]
    for facts, why in broken:
        print(f"FAIL {facts.name} sm_{facts.arch}: {'; '.join(why)}", file=sys.stderr)
    seconds = time.monotonic() - began
    print(f"{len(jobs)} compiled for {len(entries)} launches in {seconds:.0f} s, {len(broken)} fail")
    return 1 if broken or found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
