"""The machine that the comparison on a CPU runs on, and llama.cpp's environment there. Knows no model."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.cpu_process import ROOT

LLAMA_CPP = ("llama-cpp-python==0.3.36", "gguf==0.19.0")


def run_to_end(command: list[str], log: Path) -> None:
    """One process to its end. Raises RuntimeError with the end of its output."""
    with log.open("wb") as output:
        status = subprocess.run(command, stdout=output, stderr=output, cwd=ROOT, check=False).returncode
    if status:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{tail}")


def physical_cores() -> int:
    """Cores that this process may use; two threads of one core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    seen = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        seen.add(siblings.read_text(encoding="ascii") if siblings.exists() else str(cpu))
    return len(seen)


def machine(threads: int) -> str:
    """The processor's name and how much of it was used."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {threads} threads of {physical_cores()} cores"


def llama_cpp_environment(folder: Path) -> str:
    """An environment of its own, with llama.cpp built from source for this processor."""
    python = folder / "bin" / "python"
    if not (folder / "built").exists():
        print(
            "building llama.cpp from source: 5 to 10 minutes on two cores, once (needs a C++ compiler)",
            flush=True,
        )
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        log = folder / "build.log"
        run_to_end([str(python), "-m", "pip", "install", "--no-binary", "llama-cpp-python", *LLAMA_CPP], log)
        (folder / "built").write_text(f"{time.perf_counter() - began:.0f} s\n", encoding="ascii")
    return str(python)


def measured_bandwidth(threads: int, mebibytes: int) -> dict[str, float]:
    """In a process of its own: its buffers must not stay."""
    command = [sys.executable, "-m", "benchmarks.cpu_bandwidth", str(threads), str(mebibytes)]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(told)
    return found


def git_sha() -> str:
    """Of this checkout; empty where it is none."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()
