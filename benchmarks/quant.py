"""This quantizer beside llm-compressor's AWQ and GPTQ and plain rounding: `make bench-quant`.

One model with and one without planted outliers; the same calibration windows and held-out windows for all;
each quantizer in a process of its own, one after the other; one evaluator for all. Time is of the process
from start to exit and of the quantization alone, CPU time of the process, memory its peak resident set. What
the numbers mean is for docs/benchmarks.md to say.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import results
from benchmarks.quant_outliers import plant_outliers
from services.quantizer.calibration import calibration_windows, evaluation_windows, load_tokenizer
from services.quantizer.texts import BUNDLED_CALIBRATION, BUNDLED_EVALUATION

ROOT = Path(__file__).parents[1]
GROUP_SIZE = 128
SEED = 0
RIVALS = {"llm-compressor AWQ": "awq", "llm-compressor GPTQ": "gptq"}
REQUIREMENTS = ("torch==2.13.0", "llmcompressor==0.14.0.1", "transformers==5.17.0")


@dataclass(frozen=True)
class Cost:
    """Of one process: wall and CPU seconds, peak resident set in MiB; `alone` is the quantization's own wall
    time where the process tells it.
    """

    wall: float
    cpu: float
    peak_mib: float
    alone: float | None = None


@dataclass(frozen=True)
class Bench:
    """Where things lie, and how much of the text is used."""

    work: Path
    rival_python: str | None
    threads: int
    samples: int
    sequence_length: int
    evaluation_tokens: int
    methods: tuple[str, ...]
    rivals: tuple[str, ...]

    def measure(self, name: str, source: Path) -> tuple[dict[str, Cost], dict[str, Any]]:
        """All quantizers on one model: what each cost, and how good each is."""
        folder = self.work / name
        folder.mkdir(parents=True)
        calibration, evaluation = self._write_windows(source, folder)
        weights = {"rounding": _write_rounded(source, folder / "rounding.safetensors")}
        costs: dict[str, Cost] = {}
        for title in self.rivals:
            weights[title], costs[title] = self._run_rival(source, calibration, folder, RIVALS[title])
        for method in self.methods:
            title = f"weft {method}"
            weights[title], costs[title] = self._run_own(source, folder, method)
        spec = {
            "model": str(source),
            "weights": {title: str(path) for title, path in weights.items()},
            "windows": str(evaluation),
            "threads": self.threads,
            "result": str(folder / "quality.json"),
        }
        _run([sys.executable, "-m", "benchmarks.quant_evaluate"], spec, folder / "evaluate")
        return costs, json.loads((folder / "quality.json").read_text(encoding="utf-8"))

    def _write_windows(self, source: Path, folder: Path) -> tuple[Path, Path]:
        tokenizer = load_tokenizer(source)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        vocabulary, length = config["vocab_size"], min(1024, config["max_position_embeddings"])
        texts, held_out = (
            [path.read_text(encoding="utf-8") for path in paths]
            for paths in (BUNDLED_CALIBRATION, BUNDLED_EVALUATION)
        )
        windows = {
            "calibration": calibration_windows(
                tokenizer, texts, self.samples, self.sequence_length, SEED, vocabulary
            ),
            "evaluation": evaluation_windows(tokenizer, held_out, self.evaluation_tokens, length, vocabulary),
        }
        for kind, ids in windows.items():
            (folder / f"{kind}.json").write_text(json.dumps(ids.tolist()), encoding="utf-8")
        return folder / "calibration.json", folder / "evaluation.json"

    def _run_rival(self, source: Path, windows: Path, folder: Path, method: str) -> tuple[Path, Cost]:
        out, result = folder / f"rival-{method}.safetensors", folder / f"rival-{method}.json"
        spec = {
            "model": str(source),
            "windows": str(windows),
            "method": method,
            "threads": self.threads,
            "out": str(out),
            "result": str(result),
        }
        command = [str(self.rival_python), str(ROOT / "benchmarks" / "quant_rival.py")]
        cost = _run(command, spec, folder / f"rival-{method}")
        seconds = json.loads(result.read_text(encoding="utf-8"))["quantization_seconds"]
        return out, Cost(cost.wall, cost.cpu, cost.peak_mib, seconds)

    def _run_own(self, source: Path, folder: Path, method: str) -> tuple[Path, Cost]:
        artifacts = folder / f"weft-{method}"
        command = [sys.executable, "-m", "services.quantizer", "run", "--source", str(source)]
        command += ["--artifacts", str(artifacts), "--name", "model", "--method", method]
        command += ["--samples", str(self.samples), "--sequence-length", str(self.sequence_length)]
        command += ["--evaluation-tokens", "0", "--group-size", str(GROUP_SIZE), "--seed", str(SEED)]
        command += ["--threads", str(self.threads)]
        cost = _run(command, None, folder / f"weft-{method}-run")
        version = (artifacts / "model" / "CURRENT").read_text(encoding="ascii").strip()
        return artifacts / "model" / version, cost


def _write_rounded(source: Path, target: Path) -> Path:
    """Plain rounding to the full range of each group, which is made to hold zero."""
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    for name, weight in tensors.items():
        if not name.endswith("proj.weight"):
            continue
        grouped = weight.unflatten(1, (-1, GROUP_SIZE))
        low = grouped.amin(-1, keepdim=True).clamp(max=0)
        high = grouped.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=2.0**-14).half().float()
        zero = torch.round(-low / scale).clamp(0, 15)
        values = (torch.round(grouped / scale) + zero).clamp(0, 15)
        tensors[name] = ((values - zero) * scale).flatten(1).contiguous()
    save_file(tensors, target)
    return target


def _run(command: list[str], spec: dict[str, Any] | None, stem: Path) -> Cost:
    """One process to its end; its output goes to a log beside. Raises RuntimeError with the log's end."""
    if spec is not None:
        path = stem.with_name(stem.name + ".spec.json")
        path.write_text(json.dumps(spec), encoding="utf-8")
        command = [*command, str(path)]
    log = stem.with_name(stem.name + ".log")
    # Threads that wait asleep: on shared cores a spinning one holds up the one it waits for. For all alike.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def table(costs: dict[str, Cost], quality: dict[str, Any]) -> str:
    """Markdown rows, the source first."""
    lines = [
        "| weights | perplexity | mean KL (95%) | top-1 agreement (95%) | wall s | alone | CPU s | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, entry in quality.items():
        kl, top = entry["mean_kl"], entry["top1_agreement"]
        cost = costs.get(title)
        spent = "| | | |"
        if cost is not None:
            alone = "" if cost.alone is None else f"{cost.alone:.0f}"
            spent = f"| {cost.wall:.0f} | {alone} | {cost.cpu:.0f} | {cost.peak_mib:.0f}"
        lines.append(
            f"| {title} | {entry['perplexity'][0]:.3f} | {kl[0]:.5f} ({kl[1]:.5f} to {kl[2]:.5f}) "
            f"| {top[0]:.2%} ({top[1]:.2%} to {top[2]:.2%}) {spent} |"
        )
    return "\n".join(lines)


def goals(costs: dict[str, Cost], quality: dict[str, Any], name: str) -> list[str]:
    """What was aimed at, beside what was found; `name` is "plain" or "outliers"."""
    own, rivals = "weft best", [title for title in RIVALS if title in quality]
    if own not in quality or not rivals:
        return []
    kl = {title: quality[title]["mean_kl"][0] for title in (own, *rivals)}
    # With outliers the aim is GPTQ's figure: AWQ is made for them.
    best = min(rivals, key=lambda title: kl[title]) if name == "plain" else "llm-compressor GPTQ"
    if best not in kl:
        return []
    factor = 0.9 if name == "plain" else 0.5
    found = [f"mean KL / {best}: {kl[own] / kl[best]:.3f} (goal {factor})"]
    if "llm-compressor AWQ" in costs:
        awq, mine = costs["llm-compressor AWQ"], costs[own]
        seconds = mine.wall / (awq.alone or awq.wall)
        found.append(f"seconds / llm-compressor AWQ alone: {seconds:.3f} (goal 0.333)")
        found.append(f"CPU seconds / llm-compressor AWQ: {mine.cpu / awq.cpu:.3f}")
        found.append(f"peak memory / llm-compressor AWQ: {mine.peak_mib / awq.peak_mib:.3f} (goal 0.5)")
    return found


def _rows(name: str, costs: dict[str, Cost], quality: dict[str, Any]) -> list[tuple[object, ...]]:
    machine = f"{os.cpu_count()} x {platform.machine()}"
    sha = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    rows: list[tuple[object, ...]] = []
    for title, entry in quality.items():
        if title == "source":
            continue
        kl = entry["mean_kl"]
        rows.append(
            ("quant", f"{name} {title} mean_kl", "nats", *(f"{v:.6g}" for v in kl), "", "", "", machine, sha)
        )
        if title in costs:
            cost = costs[title]
            for unit, value in (("s", cost.wall), ("cpu_s", cost.cpu), ("MiB", cost.peak_mib)):
                rows.append(
                    ("quant", f"{name} {title}", unit, f"{value:.5g}", "", "", "", "", "", machine, sha)
                )
    return rows


def _rival_environment(folder: Path) -> str:
    """An environment of its own: llm-compressor pins what this project does not."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # torch first and exactly: a range could pull another build.
        for requirements in (REQUIREMENTS[:1], REQUIREMENTS):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
    return str(python)


def main() -> int:
    """Measure, print, and with --write-results keep the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo", help="a Llama in one file")
    parser.add_argument("--rival-python", help="an interpreter that has llm-compressor; default: make one")
    parser.add_argument("--rivals", nargs="*", choices=tuple(RIVALS), default=list(RIVALS))
    parser.add_argument("--models", nargs="+", choices=("plain", "outliers"), default=["plain", "outliers"])
    parser.add_argument("--methods", nargs="*", default=["awq+", "best"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--evaluation-tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=ROOT / ".weft" / "bench-quant")
    parser.add_argument("--write-results", action="store_true", help="add rows to benchmarks/results.csv")
    options = parser.parse_args()
    python = options.rival_python
    if python is None and options.rivals:
        python = _rival_environment(ROOT / ".weft" / "bench-quant-venv")
    bench = Bench(
        options.out / time.strftime("%Y%m%d-%H%M%S"),
        python,
        options.threads,
        options.samples,
        options.sequence_length,
        options.evaluation_tokens,
        tuple(options.methods),
        tuple(options.rivals),
    )
    for name in options.models:
        source = options.model
        if name == "outliers":
            bench.work.mkdir(parents=True, exist_ok=True)
            source = plant_outliers(options.model, bench.work / "planted")
        costs, quality = bench.measure(name, source)
        print(f"\n{name}, {options.threads} threads\n\n{table(costs, quality)}\n", flush=True)
        print("\n".join(goals(costs, quality, name)), flush=True)
        if options.write_results:
            results.append(_rows(name, costs, quality))
    return 0


if __name__ == "__main__":
    sys.exit(main())
