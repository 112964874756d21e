"""What the device lane runs, in order of worth, and how one phase is run: a process with a time limit.

Knows commands and clocks; nothing of what they measure.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Phase:
    """One process. `seconds`: what it may take on a device; dry runs have their own limit. `command` makes
    the arguments after the interpreter from (is_dry, seconds, file for its rows).
    """

    name: str
    title: str
    seconds: float
    module: str = "benchmarks.gpu_phase"

    def command(self, is_dry: bool, seconds: float, rows: Path) -> list[str]:
        """The process to run. It is told to stop a little before it is made to."""
        told = str(max(1.0, seconds - 8))
        arguments = ["-m", self.module, self.name, "--out", str(rows), "--seconds", told]
        return [sys.executable, *arguments, *(["--dry"] if is_dry else [])]


PHASES = (
    Phase("machine", "the device's own ceilings", 40),
    Phase("tests", "kernel tests on the device", 170, "tools.gpu.device_tests"),
    Phase("parity", "the demo model against its CPU twin and transformers", 90),
    Phase("linear", "4-bit linears against cuBLAS bf16", 90),
    Phase("attention", "attention against torch's", 90),
    Phase("model", "whole-model decoding, 8B shape", 100),
    Phase("small", "sampling, norms, rotary and KV write", 50),
    Phase("throughput", "throughput against transformers", 100),
    Phase("sweeps", "the kernel tests that are marked slow", 200, "tools.gpu.device_tests"),
)


@dataclass(slots=True)
class PhaseResult:
    """How a phase ended. `outcome`: "ok", "failed", "timeout" or "skipped". Rows as the phase wrote them."""

    name: str
    outcome: str
    seconds: float = 0.0
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_phase(phase: Phase, out: Path, seconds: float, is_dry: bool) -> PhaseResult:
    """Run one phase for at most `seconds`; its output goes to OUT/NAME.log, its rows to OUT/NAME.jsonl."""
    rows = out / f"{phase.name}.jsonl"
    rows.unlink(missing_ok=True)
    began = time.monotonic()
    with (out / f"{phase.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            phase.command(is_dry, seconds, rows), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            outcome, note = ("ok", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            outcome, note = "timeout", f"stopped after {seconds:.0f} s"
        finally:
            _end(process)
    taken = time.monotonic() - began
    found = _read_rows(rows)
    if outcome == "failed" and not any(row["status"] == "failed" for row in found):
        note += f": {_last_line(out / f'{phase.name}.log')}"
    return PhaseResult(phase.name, outcome, taken, note, found)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no output")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the phase and whatever it started: they are a session of their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are whole: a phase that was ended may have left half a line."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
