"""The phases that run the kernel tests where the kernels run: pytest in a process, its verdicts counted.

`tests` are those of the default run, `sweeps` those marked slow.

Reads verdicts off the running output, so that a run out of time still says what passed. Uses pytest-xdist
where it is installed (compiling takes longer than running) and leans on no other plugin: the project's own
pytest settings name plugins that a bare box lacks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

PATTERNS = ("tests/services/engine/kernels/gpu/test_*.py", "tests/services/engine/runner/test_device*.py")
_VERDICT = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?:\s|$)")
_TEST = re.compile(r"(tests/[\w./-]+\.py)(::\S+)?")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--dry", action="store_true", help="collect all, run one file")
    return parser.parse_args()


def command(paths: list[str], is_dry: bool, marks: str = "not slow") -> list[str]:
    """pytest without the project's ini file and without a cache."""
    base = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", ".", "-p", "no:cacheprovider"]
    base += ["--import-mode=importlib", "-o", "pythonpath=.", "-v", "--tb=short", "-ra", "-m", marks]
    if is_dry:
        base += ["-p", "no:asyncio", "-p", "no:xdist"]
    elif importlib.util.find_spec("xdist"):
        base += ["-n", "8"]
    return [*base, *paths]


def main() -> int:
    arguments = _arguments()
    give_up_at = time.monotonic() + arguments.seconds
    paths = sorted(str(path) for pattern in PATTERNS for path in Path().glob(pattern))
    marks = "slow" if arguments.phase == "sweeps" else "not slow"
    rows = []
    if arguments.dry:
        collect = [*command(paths, True, marks), "--collect-only", "-q"]
        rows.append(_run("collected", collect, give_up_at))
        paths = [path for path in paths if "silu" in path and marks != "slow"]
    if paths:
        rows += _run_each(command(paths, arguments.dry, marks), give_up_at)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return int(any(row["status"] == "failed" for row in rows))


def _run_each(arguments: list[str], give_up_at: float) -> list[dict[str, Any]]:
    """One row per test file from one pytest process, and one for the whole."""
    text, code = _pytest(arguments, give_up_at)
    print(text, flush=True)
    by_file: dict[str, Counter[str]] = {}
    failed: dict[str, list[str]] = {}
    for line in text.splitlines():
        verdict, test = _VERDICT.search(line), _TEST.search(line)
        if verdict and test:
            by_file.setdefault(test[1], Counter())[verdict[1]] += 1
            if verdict[1] in ("FAILED", "ERROR"):
                failed.setdefault(test[1], []).append((test[2] or "").removeprefix("::"))
    rows = [
        _row(Path(path).name, ", ".join(f"{n} {v.lower()}" for v, n in counts.items()), failed.get(path, []))
        for path, counts in sorted(by_file.items())
    ]
    total: Counter[str] = sum(by_file.values(), Counter())
    note = f"{total['PASSED']} passed of {sum(total.values())}"
    rows.append(_row("all kernel tests", note + ("" if code is not None else ", stopped: out of time"), []))
    if code not in (0, None) and not failed:
        rows.append(_row("pytest", f"exit code {code}", ["see tests.log"]))
    return rows


def _run(case: str, arguments: list[str], give_up_at: float) -> dict[str, Any]:
    text, code = _pytest(arguments, give_up_at)
    lines = [line for line in text.splitlines() if line.strip()]
    print("\n".join(lines[-30:]), flush=True)
    return _row(case, lines[-1] if lines else "", [] if code == 0 else ["see tests.log"])


def _pytest(arguments: list[str], give_up_at: float) -> tuple[str, int | None]:
    """(output, exit code); None when it had to be stopped."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(timeout=max(1.0, give_up_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        output.seek(0)
        return output.read(), code


def _row(case: str, note: str, failed: list[str]) -> dict[str, Any]:
    names = f": {', '.join(failed[:8])}" if failed else ""
    row = dict.fromkeys(("unit", "baseline"), "") | dict.fromkeys(
        ("median", "p20", "p80", "baseline_median", "ratio", "target")
    )
    status = "failed" if failed else "ok"
    return {
        "benchmark": "tests",
        "case": case,
        "status": status,
        "is_low_good": False,
        **row,
        "note": note + names,
    }


if __name__ == "__main__":
    sys.exit(main())
