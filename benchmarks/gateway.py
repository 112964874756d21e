"""What the gateway costs: `make bench-gateway`, or `python -m benchmarks.gateway [--quick] [--only ...]`.

A gateway process, an engine process without a model and a client process, all on this machine. Rates are per
CPU second of the gateway, read from /proc, so they hold on a machine that does other work; times are of the
wall and do not. Added latency is the age of a token at the client through the gateway, less its age in a
direct call to the same engine at the same pace, runs in turn. The leak detector is shown a gateway that
leaks. Prints one table; `--json FILE` keeps everything; `--write-results` adds the rows to results.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.gateway_processes import ROOT, client, engine, gateway

CLOCK_FLAGS: dict[str, object] = {"num_blocks": 8192, "block_size": 128, "max_model_len": 8192}
COALESCE_MS = 20
MIB_IDLE = 400
# What the control must show, and what a gateway that does not leak may, in bytes a request.
MIN_LEAK, MAX_LEAK = 80, 20


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    streams: int
    seconds: float
    latency_streams: int
    latency_tokens: int
    latency_runs: int
    idle_streams: int
    cancels: int
    control_cancels: int


FULL = Size(256, 10.0, 64, 400, 5, 10_000, 100_000, 20_000)
QUICK = Size(256, 4.0, 64, 120, 3, 2_000, 10_000, 10_000)


@dataclass(frozen=True)
class Row:
    """One line of the table. `is_ok` None: no goal, told for what it explains."""

    phase: str
    what: str
    goal: str
    measured: float
    unit: str
    is_ok: bool | None
    low: float | None = None
    high: float | None = None


def throughput(size: Size, keep: dict[str, Any]) -> list[Row]:
    """Tokens per CPU second with coalescing, and one by one."""
    rows = []
    for name, flags, step_ms, goal in (
        ("coalescing", {"max_coalesce": COALESCE_MS}, 5, 60_000),
        ("one by one", {"max_coalesce": 0}, 10, 24_000),
    ):
        with (
            engine("clock", step_ms=step_ms, **CLOCK_FLAGS) as server,
            gateway(server.address(), **flags) as door,
        ):
            found = client("throughput", door.address(), door.pid, size.streams, size.seconds)
        keep[name] = found
        rate, each = found["tokens_per_cpu_s"], found["tokens_per_message"]
        rows += [
            Row("throughput", f"tokens per CPU second, {name}", f">= {goal}", rate, "1/s", rate >= goal),
            Row("throughput", f"  tokens in a message, {name}", "", each, "", None),
            Row(
                "throughput",
                f"  CPU time of a message, {name}",
                "",
                1e6 / found["messages_per_cpu_s"],
                "us",
                None,
            ),
            Row(
                "throughput",
                f"  tokens per second of the wall, {name}",
                "",
                found["tokens"] / found["wall_s"],
                "1/s",
                None,
            ),
        ]
    return rows


def latency(size: Size, keep: dict[str, Any]) -> list[Row]:
    """What the gateway adds to a token's way, over interleaved runs."""
    runs = []
    with engine("clock", step_ms=30, **CLOCK_FLAGS) as server, gateway(server.address()) as door:
        for _ in range(size.latency_runs):
            direct = client("latency", server.address(), "direct", size.latency_streams, size.latency_tokens)
            through = client("latency", door.address(), "gateway", size.latency_streams, size.latency_tokens)
            runs.append({"direct": direct, "gateway": through})
    keep["latency"] = runs
    rows = []
    for name, goal in (("p50", 0.5), ("p99", 2.0)):
        key = f"{name}_ms"
        added = [run["gateway"][key] - run["direct"][key] for run in runs]
        middle = statistics.median(added)
        direct_ms = statistics.median(run["direct"][key] for run in runs)
        rows += [
            Row(
                "latency",
                f"added latency {name}",
                f"< {goal}",
                middle,
                "ms",
                middle < goal,
                min(added),
                max(added),
            ),
            Row("latency", f"  {name} of a direct call", "", direct_ms, "ms", None),
        ]
    return rows


def idle(size: Size, keep: dict[str, Any]) -> list[Row]:
    """Memory of open streams, and the end of all of them at once."""
    with engine("quiet") as server, gateway(server.address()) as door:
        found = client("idle", door.address(), door.pid, door.address("http"), size.idle_streams)
    keep["idle"] = found
    streams = size.idle_streams
    rss, storm = found["rss_mib"], found["storm_s"]
    return [
        Row("idle", f"memory with {streams} idle streams", f"< {MIB_IDLE}", rss, "MiB", rss < MIB_IDLE),
        Row("idle", "  each", "", found["kib_per_stream"], "KiB", None),
        Row("idle", "  CPU while idle", "", 100 * found["idle_cpu_share"], "%", None),
        Row("idle", f"{streams} cancels at once are over in", "< 1", storm, "s", storm < 1.0),
        Row("idle", "  sent within", "", found["storm_sent_s"], "s", None),
        Row("idle", "  gateway's CPU time", "", found["storm_cpu_s"], "s", None),
    ]


def leak(size: Size, keep: dict[str, Any]) -> list[Row]:
    """Memory that a cancelled request leaves behind, and the same where something is known to stay."""
    with engine("quiet") as server:
        with gateway(server.address()) as door:
            found = client("cancels", door.address(), door.pid, size.cancels)
        with gateway(server.address(), module="benchmarks.gateway_leaky") as door:
            control = client("cancels", door.address(), door.pid, size.control_cancels)
    keep["leak"], keep["leak control"] = found, control
    each, leaked = found["bytes_per_request"], control["bytes_per_request"]
    # Pages come and go: what few requests leave is not told apart from that.
    bound = MAX_LEAK * FULL.cancels / size.cancels
    return [
        Row(
            "leak",
            f"memory kept per cancelled request, {size.cancels} of them",
            f"< {bound:.0f}",
            each,
            "bytes",
            each < bound,
        ),
        Row(
            "leak",
            "  the same where it leaks on purpose",
            f"> {MIN_LEAK}",
            leaked,
            "bytes",
            leaked > MIN_LEAK,
        ),
        Row("leak", "  requests opened and cancelled per second", "", found["requests_per_s"], "1/s", None),
    ]


PHASES: dict[str, Callable[[Size, dict[str, Any]], list[Row]]] = {
    "throughput": throughput,
    "latency": latency,
    "idle": idle,
    "leak": leak,
}


def machine() -> dict[str, Any]:
    """Where this ran, and what else the machine was doing."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def git_sha() -> str:
    """Of this checkout, with a + when something is not committed; empty without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def table(rows: list[Row]) -> str:
    """The rows for a person."""
    lines = [f"{'':58} {'goal':>10} {'measured':>12}"]
    for row in rows:
        digits = 0 if abs(row.measured) >= 1000 else 2
        verdict = {None: "", True: "ok", False: "not reached"}[row.is_ok]
        spread = "" if row.low is None or row.high is None else f"  ({row.low:.2f} to {row.high:.2f})"
        lines.append(
            f"{row.what:58} {row.goal:>10} {row.measured:12,.{digits}f} {row.unit:5} {verdict}{spread}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure, print, keep. 0 whatever was measured: a missed goal is a result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, within two minutes")
    parser.add_argument("--only", nargs="+", choices=list(PHASES), default=list(PHASES), metavar="PHASE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write-results", action="store_true", help="add the rows to results.csv")
    parser.add_argument("--git-sha", default=git_sha(), help="where there is no repository", metavar="SHA")
    arguments = parser.parse_args(argv)
    size = QUICK if arguments.quick else FULL
    about = {**machine(), "git_sha": arguments.git_sha, "is_quick": arguments.quick}
    rows: list[Row] = []
    keep: dict[str, Any] = {}
    for name in arguments.only:
        begun = time.monotonic()
        rows += PHASES[name](size, keep)
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    about["load_after"] = os.getloadavg()[0]
    print(table(rows))
    load = f"load {about['load']:.1f} to {about['load_after']:.1f}"
    print(f"{about['cpu']}, {about['cores']} cores, {load}, {about['git_sha']}")
    if arguments.json is not None:
        text = json.dumps({"about": about, "rows": [asdict(row) for row in rows], "runs": keep}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.write_results:
        place = f"{about['cpu']} x{about['cores']}"
        results.append(
            (
                "gateway",
                row.what.strip(),
                row.unit,
                row.measured,
                row.low or "",
                row.high or "",
                "goal",
                row.goal,
                "",
                place,
                about["git_sha"],
            )
            for row in rows
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
