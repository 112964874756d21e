"""Worker processes of the comparison on a CPU, and what else the machine did while one of them was timed.

A `Worker` is loaded once and stays; between its turns it waits in a read. `Watch` tells the processor time of
the workers that had no turn, and of everything that is none of ours. Knows no system.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")


class WorkerFailed(RuntimeError):
    """A worker ended, or answered that it could not; the message is one line."""


class Worker:
    """One system's process, over pipes. Its stderr goes to a log."""

    def __init__(self, name: str, python: str, spec_file: Path, log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.cpu_worker", name, str(spec_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self) -> dict[str, Any]:
        """The next answer. Raises WorkerFailed."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise WorkerFailed(f"{self.name} ended with {self._process.wait()}; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {answer['error'].splitlines()[0]}; see {self._log}")
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        """Have one thing done. Raises WorkerFailed."""
        if self._process.stdin is None:
            raise WorkerFailed(f"{self.name} has no input")
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading says how
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End of input ends it; what does not end in time is killed."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def process_seconds(pid: int) -> float:
    """Processor time of a process so far, of all its threads."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def machine_seconds() -> float:
    """Processor time of everything on this machine so far, time stolen by its host included."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS


@dataclass(frozen=True)
class Beside:
    """Cores that were busy with something else while one worker was timed."""

    idle_workers: float
    others: float


class Watch:
    """Begins when it is made."""

    def __init__(self, timed: int, idle: Iterable[int]) -> None:
        self._timed, self._idle = timed, list(idle)
        self._began = time.perf_counter()
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        idle = sum(process_seconds(pid) for pid in self._idle)
        return process_seconds(self._timed), idle, machine_seconds()

    def end(self) -> Beside:
        """Since it began."""
        seconds = time.perf_counter() - self._began
        timed, idle, machine = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return Beside(idle / seconds, max(0.0, machine - timed - idle) / seconds)
