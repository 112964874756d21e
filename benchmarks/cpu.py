"""This engine beside llama.cpp and transformers on a CPU: `make bench-cpu`.

Random weights of the TinyLlama-1.1B shape, the same for all: int4 in groups of 128, Q4_0, bf16. Decoding 1,
4 and 16 sequences behind 128 tokens each, and the prefill of 512. Each system has a process of its own,
which stays loaded and asleep while others are timed; each case is timed in turn, in an order that rotates,
five times. First every system's logits are compared with a reference: wrong ones get no time.
docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.cpu_machine import (
    git_sha,
    llama_cpp_environment,
    machine,
    measured_bandwidth,
    physical_cores,
    run_to_end,
)
from benchmarks.cpu_process import ROOT, Beside, Watch, Worker, WorkerFailed
from benchmarks.cpu_report import OWN, Outcome, judged_lines, ratios, result_rows, roofline, table
from benchmarks.cpu_shape import (
    CLOCKS,
    QUICK,
    TINY,
    TINYLLAMA,
    WORKLOAD,
    Dimensions,
    Workload,
    folder_name,
    to_spec,
)

RIVALS = ("llama.cpp", "transformers")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to run, with whose interpreters."""

    dimensions: Dimensions
    workload: Workload
    threads: int
    runs: int
    pythons: dict[str, str]
    folder: Path
    out: Path
    settings: dict[str, dict[str, str]]
    modules: dict[str, str] = dataclasses.field(default_factory=dict)

    def prepare(self) -> Path:
        """Weights, reference and GGUF file, unless an earlier run has made them. Returns the spec's path."""
        self.out.mkdir(parents=True, exist_ok=True)
        spec = {
            **to_spec(self.dimensions, self.workload),
            "threads": self.threads,
            "folder": str(self.folder),
            "settings": self.settings,
            "modules": self.modules,
        }
        path = self.out / "spec.json"
        path.write_text(json.dumps(spec, indent=1), encoding="utf-8")
        if not self.folder.exists():
            print("writing the weights and computing the reference: two minutes, once", flush=True)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            run_to_end([sys.executable, "-m", "benchmarks.cpu_weights", str(path)], self.out / "weights.log")
        if "llama.cpp" in self.pythons and not (self.folder / "q4_0.gguf").exists():
            print("writing the GGUF file: a minute, once", flush=True)
            command = [self.pythons["llama.cpp"], str(ROOT / "benchmarks" / "cpu_gguf.py"), str(self.folder)]
            run_to_end(command, self.out / "gguf.log")
        return path

    def measure(self) -> tuple[list[Outcome], dict[str, Beside]]:
        """All systems, and what was beside each timed run ("round, case, system")."""
        spec = self.prepare()
        workers: dict[str, Worker] = {}
        outcomes = {name: Outcome(name) for name in self.pythons}
        try:
            for name, python in self.pythons.items():
                print(f"{name}: loading, checking its logits", flush=True)
                workers[name] = Worker(name, python, spec, self.out / f"{name}.log")
                _check(workers[name], outcomes[name])
            beside = self._rounds(workers, outcomes)
        finally:
            for worker in workers.values():
                worker.close()
        return list(outcomes.values()), beside

    def _rounds(self, workers: dict[str, Worker], outcomes: dict[str, Outcome]) -> dict[str, Beside]:
        beside: dict[str, Beside] = {}
        names = [name for name in workers if outcomes[name].failure is None]
        for number in range(1, self.runs + 1):
            for case in self.workload.cases:
                first = number % max(1, len(names))
                for name in [*names[first:], *names[:first]]:
                    outcome = outcomes[name]
                    if outcome.failure is not None:
                        continue
                    watch = Watch(workers[name].pid, (w.pid for n, w in workers.items() if n != name))
                    try:
                        rate = workers[name].ask(do="run", case=case, run=number)["rate"]
                    except WorkerFailed as error:
                        outcome.failure, outcome.rates = str(error), {}
                        print(outcome.failure, flush=True)
                        continue
                    found = beside[f"{number}, {case}, {name}"] = watch.end()
                    outcome.rates.setdefault(case, []).append(rate)
                    told = f"{rate:8.2f} tokens/s   other work {found.others:.2f} cores"
                    print(f"round {number}  {case:12} {name:14} {told}", flush=True)
        return beside


def _check(worker: Worker, outcome: Outcome) -> None:
    """Wait until it is loaded; keep its facts and judge its logits."""
    try:
        worker.read()
        outcome.facts = worker.ask(do="facts")
        outcome.errors = worker.ask(do="check")["errors"]
        outcome.judge()
    except WorkerFailed as error:
        outcome.failure = str(error)
    if outcome.failure is not None:
        print(f"{outcome.name} FAILED: {outcome.failure}", flush=True)


def report(
    bench: Bench, outcomes: list[Outcome], beside: dict[str, Beside], bandwidth: dict[str, float]
) -> dict[str, Any]:
    """Print everything; return what goes into results.json."""
    lines = judged_lines(outcomes) if bench.dimensions == TINYLLAMA else []
    if bench.settings[OWN]["clock"] != "wall":
        print("\nPER SECOND OF PROCESSOR TIME, not of the clock")
    others = [entry.others for entry in beside.values()] or [0.0]
    idle = max((entry.idle_workers for entry in beside.values()), default=0.0)
    print(
        f"\n{machine(bench.threads)}; {bench.runs} rounds; cores used by others, in the mean and at most: ",
        end="",
    )
    print(f"{sum(others) / len(others):.2f} and {max(others):.2f}; by systems that had no turn: {idle:.2f}\n")
    print(table(outcomes, has_lines=bool(lines)), "\n")
    print(f"memory: read {bandwidth['read'] / 1e9:.1f} GB/s, copy {bandwidth['copy'] / 1e9:.1f} GB/s")
    print("\n".join(roofline(outcomes, bandwidth["read"])))
    for outcome in outcomes:
        if outcome.failure is not None:
            print(f"{outcome.name} FAILED: {outcome.failure}")
            continue
        resident = outcome.facts["resident_bytes"] / 2**20
        errors = ", ".join(f"{case} {error:.3f}" for case, error in outcome.errors.items())
        print(f"{outcome.name}: {outcome.facts['version']}; {outcome.facts['weights']}")
        weights = outcome.facts["weight_bytes"] / 2**20
        print(f"    {weights:.0f} MiB of weights, {resident:.0f} MiB resident after loading")
        print(f"    logits off by: {errors}")
    return {
        "machine": machine(bench.threads),
        "clock": bench.settings[OWN]["clock"],
        "git_sha": git_sha(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": os.getloadavg(),
        "bandwidth": bandwidth,
        "systems": [dataclasses.asdict(outcome) for outcome in outcomes],
        "ratios": {
            f"{rival}, {case}": dataclasses.asdict(r) for (rival, case), r in ratios(outcomes).items()
        },
        "lines": lines,
        "beside": {key: dataclasses.asdict(value) for key, value in beside.items()},
    }


def _rivals(text: str) -> list[str]:
    names = [name for name in text.split(",") if name and name != "none"]
    if unknown := [name for name in names if name not in RIVALS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known ({', '.join(RIVALS)} or none)")
    return names


def _batches(text: str) -> tuple[int, ...]:
    known = [batch for batch, _ in WORKLOAD.steps]
    found = tuple(int(part) if part.isdigit() else 0 for part in text.split(","))
    if not set(found) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r}: any of {', '.join(map(str, known))}")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rivals", type=_rivals, default=list(RIVALS), metavar="A,B", help="llama.cpp,transformers; none"
    )
    parser.add_argument(
        "--threads", type=int, default=physical_cores(), help="of each system; default: all cores"
    )
    parser.add_argument(
        "--batches", type=_batches, default=(1, 4, 16), metavar="1,4,16", help="decode these only"
    )
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: tokens per second of processor time, for a machine that others use (with --threads 1)",
    )
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each case")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, one run: whether it works, not how fast it is"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a line of acceptance is missed")
    parser.add_argument(
        "--rival-python", help="an interpreter that has llama-cpp-python and gguf; default: make one"
    )
    parser.add_argument(
        "--flash-attention", choices=("auto", "on", "off"), default="auto", help="of llama.cpp"
    )
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="of transformers")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".weft" / "bench-cpu", help="where weights are kept: 4 GB"
    )
    parser.add_argument("--write-results", action="store_true", help="add rows to benchmarks/results.csv")
    options = parser.parse_args(argv)
    for name in ("threads", "runs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.check and (options.quick or not options.rivals):
        parser.error("--check has nothing to check without a rival, or with --quick")
    return options


def make_bench(options: argparse.Namespace) -> Bench:
    """From the command line; makes llama.cpp's environment where it is missing."""
    dimensions, workload = (TINY, QUICK) if options.quick else (TINYLLAMA, WORKLOAD)
    steps = tuple((batch, steps) for batch, steps in workload.steps if batch in options.batches)
    workload = dataclasses.replace(workload, steps=steps)
    pythons = {OWN: sys.executable}
    if "llama.cpp" in options.rivals:
        pythons["llama.cpp"] = options.rival_python or llama_cpp_environment(
            ROOT / ".weft" / "bench-cpu-venv"
        )
    if "transformers" in options.rivals:
        pythons["transformers"] = sys.executable
    return Bench(
        dimensions,
        workload,
        options.threads,
        1 if options.quick else options.runs,
        pythons,
        (options.work / folder_name(dimensions, workload)).absolute(),
        (options.work / time.strftime("run-%Y%m%d-%H%M%S")).absolute(),
        {
            OWN: {"clock": options.clock},
            "llama.cpp": {"clock": options.clock, "flash_attention": options.flash_attention},
            "transformers": {"clock": options.clock, "cache": options.cache},
        },
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, print, keep; 1 when a system failed, or with --check a line was missed."""
    options = parse(argv)
    began = time.perf_counter()
    try:
        bench = make_bench(options)
        bandwidth = measured_bandwidth(bench.threads, 8 if options.quick else 512)
        outcomes, beside = bench.measure()
    except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
        print(f"bench-cpu: {error}", file=sys.stderr)
        return 1
    found = report(bench, outcomes, beside, bandwidth)
    path = bench.out / "results.json"
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"\n{time.perf_counter() - began:.0f} s in all; {path}")
    if options.write_results and options.clock == "wall":
        results.append(result_rows(outcomes, found["machine"], found["git_sha"]))
    has_failed = any(outcome.failure is not None for outcome in outcomes)
    is_missed = options.check and not all(line["is_accepted"] for line in found["lines"])
    return int(has_failed or is_missed)


if __name__ == "__main__":
    sys.exit(main())
