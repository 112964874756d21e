"""One system in a process of its own: reads commands, one JSON object a line, and answers in kind.

    python -m benchmarks.cpu_worker NAME SPEC.json

Between commands it waits in a read and uses no processor. What the system's libraries print goes to stderr.
Every system is driven by this one loop; it knows none of them but by name.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.cpu_shape import Dimensions, Workload, from_spec
from weft.config import let_waiting_threads_sleep

MODULES = {
    "weft": "benchmarks.cpu_engine",
    "llama.cpp": "benchmarks.cpu_llama_cpp",
    "transformers": "benchmarks.cpu_transformers",
}


class System(Protocol):
    """What each module's `System` does. Made from (folder, dimensions, workload, threads, settings)."""

    def fill(self, prompts: list[list[int]]) -> None: ...

    def logits_after(self, batch: int) -> np.ndarray: ...

    def prefill_logits(self, prompt: list[int]) -> np.ndarray: ...

    def decode(self, batch: int, warm_steps: int, steps: int) -> float: ...

    def prefill(self, prompt: list[int]) -> float: ...

    def facts(self) -> dict[str, Any]: ...


def resident_bytes() -> int:
    """Of this process; Linux alone tells it. 0 elsewhere."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest over rows of |found - expected| / |expected|; infinite where something is not finite."""
    rows = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(np.max(rows)) if np.isfinite(rows).all() else float("inf")


class Worker:
    """A system and what is asked of it."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        self.dimensions: Dimensions
        self.workload: Workload
        self.dimensions, self.workload = from_spec(spec)
        self._folder = Path(spec["folder"])
        module = importlib.import_module(spec.get("modules", {}).get(name, MODULES[name]))
        settings = spec.get("settings", {}).get(name, {})
        self.system: System = module.System(
            self._folder, self.dimensions, self.workload, spec["threads"], settings
        )
        self._loaded_bytes = resident_bytes()
        prompts = self.workload.prompts(self.dimensions.vocab_size)
        self.system.fill(prompts[: self.workload.max_batch])

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do one thing: facts, check or run."""
        match command["do"]:
            case "facts":
                return {**self.system.facts(), "resident_bytes": self._loaded_bytes}
            case "check":
                return {"errors": self.check()}
            case "run":
                return {"rate": self.run(command["case"], command["run"])}
        raise ValueError(f"unknown command {command['do']!r}")

    def check(self) -> dict[str, float]:
        """How far each case's logits are from the reference."""
        expected = np.load(self._folder / "reference.npz")
        errors = {}
        for batch, _ in self.workload.steps:
            found = self.system.logits_after(batch)
            errors[f"decode {batch}"] = relative_error(found, expected["decode"][:batch])
        found = self.system.prefill_logits(self.workload.prefill_prompt(self.dimensions.vocab_size, 0))
        errors[f"prefill {self.workload.prefill}"] = relative_error(found, expected["prefill"])
        return errors

    def run(self, case: str, number: int) -> float:
        """Tokens per second of one timed run."""
        kind, size = case.split()
        if kind == "prefill":
            prompt = self.workload.prefill_prompt(self.dimensions.vocab_size, number)
            return len(prompt) / self.system.prefill(prompt)
        steps = dict(self.workload.steps)[int(size)]
        return int(size) * steps / self.system.decode(int(size), self.workload.warm_steps, steps)


def serve(name: str, spec_file: Path) -> None:
    """Load, say so, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if name == "weft":
        let_waiting_threads_sleep()  # as the service does, before torch is imported
    try:
        worker = Worker(name, json.loads(spec_file.read_text(encoding="utf-8")))
        say({"ready": True})
        for line in sys.stdin:
            say(worker.answer(json.loads(line)))
    except Exception as error:  # told to who asked; the log has the rest
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
