"""What `weft bench` itself costs, and how far its numbers are from the truth.

    python -m benchmarks.bench_overhead [--quick] [--json FILE]

* **truth**: a server that sends tokens at known times and remembers when it did; TTFT and gaps that the tool
  reports less those of the server, for p50 and p99, at light and heavier load.
* **cost**: the tool's processor time for a token, a message and a request, over each protocol.
* **ceiling**: the tokens a second it takes from a server that sends as fast as it can, in one process and in
  two, and whether it said that it was saturated.
* **schedule**: how late its open loop is, and that the result says so.
* **mock**: the same cost against a real gateway and the mock engine.

Ends with 1 when a result does not hold together: a request unaccounted for, lateness not reported, the
distance from the truth above MAX_OFF_MS on free cores. The load average stands beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gateway_processes import ROOT, Service, gateway
from cli.bench.percentiles import percentile

MAX_OFF_MS = 5.0
FREE_LOAD = 1.5
PROTOCOLS = {"grpc": [], "multiplex": ["--multiplex"], "http": [], "chat": ["--endpoint", "chat"]}


@contextmanager
def timed_server(**flags: float) -> Iterator[dict[str, str]]:
    """The addresses of one in a process of its own."""
    given = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bench_server", *given],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def measured(protocol: str, addresses: dict[str, str], *arguments: object) -> dict[str, Any]:
    """Run the tool, in a process of its own, and return its one point. Raises RuntimeError."""
    is_grpc = protocol in ("grpc", "multiplex")
    where = ["--server", addresses["grpc"]] if is_grpc else ["--url", f"http://{addresses['http']}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "cli", "bench", *where, *PROTOCOLS[protocol], "--json", str(path)]
        command += [str(argument) for argument in arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1000:]}")
        point: dict[str, Any] = json.loads(path.read_text())["points"][0]
    requests = point["requests"]
    if requests["sent"] != sum(requests[name] for name in ("ok", "failed", "cancelled", "interrupted")):
        raise RuntimeError(f"requests are not accounted for: {requests}")
    return point


def truth_of(addresses: dict[str, str]) -> list[dict[str, Any]]:
    """What the server did since the last look."""
    with urllib.request.urlopen(f"http://{addresses['http']}/truth", timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


def off_ms(point: dict[str, Any], truths: list[dict[str, Any]]) -> dict[str, float]:
    """Reported less true, in milliseconds. The server's requests of the tool's own probe are left out: they
    come first.
    """
    truths = truths[-point["requests"]["sent"] :]
    ttft = sorted(1e3 * (t["sent"][0] - t["received"]) for t in truths)
    gaps = sorted(1e3 * (b - a) for t in truths for a, b in zip(t["sent"], t["sent"][1:], strict=False))
    latency = point["latency_ms"]
    return {
        f"{name}_p{p}": latency[metric][f"p{p}"] - percentile(values, p)
        for name, metric, values in (("ttft", "ttft", ttft), ("itl", "message_gap", gaps))
        for p in (50, 99)
    }


def costs(point: dict[str, Any]) -> dict[str, float]:
    """Processor time of the tool, by what it bought."""
    tokens = point["tokens"]["output"]["sum"]
    messages = tokens / (point["tokens"]["per_message"] or 1.0)
    cpu_us = point["client"]["cpu_s"] * 1e6
    return {
        "us_per_message": cpu_us / messages,
        "us_per_token": cpu_us / tokens,
        "us_per_request": cpu_us / point["requests"]["sent"],
        "cpu_share": point["client"]["cpu_share"],
        "tokens_per_s": point["throughput"]["output_tokens_per_s"],
    }


def check_truth(is_quick: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Two loads over each protocol, beside the truth."""
    rows, problems = [], []
    for concurrency in (4, 32):
        with timed_server(first_ms=30, gap_ms=20) as addresses:
            for protocol in PROTOCOLS:
                num_requests = concurrency * (4 if is_quick else 10)
                flags = ("--concurrency", concurrency, "--requests", num_requests, "--output-tokens", 50)
                truth_of(addresses)
                point = measured(protocol, addresses, *flags)
                off = off_ms(point, truth_of(addresses))
                load = os.getloadavg()[0]
                rows.append({"protocol": protocol, "concurrency": concurrency, "load": load, **off})
                if load < FREE_LOAD and max(map(abs, off.values())) > MAX_OFF_MS:
                    problems.append(f"{protocol} at {concurrency} is off by {off}")
    return rows, problems


def check_costs(is_quick: bool) -> list[dict[str, Any]]:
    """Steady streams, 64 of them."""
    rows = []
    with timed_server(first_ms=20, gap_ms=40) as addresses:
        for protocol in PROTOCOLS:
            count = 64 if is_quick else 256
            flags = ("--concurrency", 64, "--requests", count, "--output-tokens", 100)
            point = measured(protocol, addresses, *flags)
            rows.append({"protocol": protocol, "load": os.getloadavg()[0], **costs(point)})
    return rows


def check_ceiling(is_quick: bool) -> list[dict[str, Any]]:
    """As fast as it goes; the server may be the slower one, which the processor share tells."""
    rows = []
    for processes in (1, 2):
        with timed_server(first_ms=0, gap_ms=0) as addresses:
            for protocol in PROTOCOLS:
                seconds = 3 if is_quick else 10
                flags = ("--concurrency", 16, "--duration", seconds, "--output-tokens", 1000)
                point = measured(protocol, addresses, *flags, "--processes", processes)
                said = any("of a core" in warning for warning in point["warnings"])
                row = {"protocol": protocol, "processes": processes, "load": os.getloadavg()[0]}
                rows.append({**row, **costs(point), "said_saturated": said})
    return rows


def check_schedule(is_quick: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Open loops of short answers."""
    rows, problems = [], []
    with timed_server(first_ms=5, gap_ms=5) as addresses:
        for rate in (50, 400):
            for protocol in ("grpc", "http"):
                flags = ("--rate", rate, "--duration", 2 if is_quick else 8, "--output-tokens", 4)
                point = measured(protocol, addresses, *flags)
                late = point["client"]["schedule_lateness_ms"]
                if not late or late["count"] != point["requests"]["sent"]:
                    problems.append(f"{protocol} at {rate}/s does not report its lateness: {late}")
                    continue
                row = {"protocol": protocol, "rate": rate, "load": os.getloadavg()[0]}
                rows.append({**row, **{f"late_{name}_ms": late[name] for name in ("p50", "p99", "max")}})
    return rows, problems


def check_mock(is_quick: bool) -> list[dict[str, Any]]:
    """A real gateway before the mock engine."""
    rows = []
    engine = Service("tools.mock_engine", "serve", "--listen", "127.0.0.1:0", "--step-ms", 20)
    try:
        engine.wait_for("serving")
        with gateway(engine.address("serving")) as service:
            addresses = {"grpc": service.address(), "http": service.address("http")}
            for protocol in PROTOCOLS:
                count = 64 if is_quick else 256
                flags = ("--concurrency", 64, "--requests", count, "--output-tokens", 100, "--model", "demo")
                point = measured(protocol, addresses, *flags)
                rows.append({"protocol": protocol, "load": os.getloadavg()[0], **costs(point)})
    finally:
        engine.stop()
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table in Markdown."""
    print(f"\n{title}\n")
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        print("| " + " | ".join(cells) + " |")


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description="What weft bench costs, and how true it is.")
    parser.add_argument("--quick", action="store_true", help="seconds rather than minutes")
    parser.add_argument("--json", type=Path, help="write all figures there")
    flags = parser.parse_args()
    truth, problems = check_truth(flags.quick)
    show("reported less true, ms", truth)
    cost = check_costs(flags.quick)
    show("cost, timed server, 64 streams", cost)
    ceiling = check_ceiling(flags.quick)
    show("ceiling, flooding server, 16 streams", ceiling)
    schedule, more = check_schedule(flags.quick)
    show("lateness of the open loop", schedule)
    mock = check_mock(flags.quick)
    show("cost, gateway and mock engine, 64 streams", mock)
    if flags.json:
        figures = {"truth": truth, "cost": cost, "ceiling": ceiling, "schedule": schedule, "mock": mock}
        flags.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for problem in (*problems, *more):
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if (*problems, *more) else 0


if __name__ == "__main__":
    sys.exit(main())
