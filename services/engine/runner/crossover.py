"""From how many rows on a 4-bit linear is faster dequantised than multiplied packed: measured, and
remembered.

Once per artifact, kind of processor and thread count: the figure is kept as a small JSON file when a
directory is given. The host's name is not asked: a container has a new one at every start.
Knows linears and clocks; the figure changes speed and rounding, so deterministic engines never use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from services.engine.kernels.int4pack import Int4PackLinear
from services.engine.kernels.linear import Linear

_ROW_COUNTS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_REPEATS = 5
_log = logging.getLogger(__name__)


def set_crossover(linears: Iterable[Linear], artifact_digest: str, cache_dir: Path | None) -> int | None:
    """Measure (or recall) the figure and give it to every packed linear. None when there is no packed
    linear.
    """
    packed = [linear for linear in linears if isinstance(linear, Int4PackLinear)]
    if not packed:
        return None
    path = None if cache_dir is None else cache_dir / f"crossover-{_host_key(artifact_digest)}.json"
    rows = _recall(path)
    if rows is None:
        rows = measure_crossover(max(packed, key=lambda linear: linear.in_features * linear.out_features))
        _remember(path, rows)
    for linear in packed:
        linear.crossover_rows = rows
    return rows


@torch.inference_mode()
def measure_crossover(linear: Int4PackLinear) -> int:
    """The least row count of a fixed list at which dequantising wins there and at the next one too."""
    wins = 0
    for index, rows in enumerate(_ROW_COUNTS):
        x = torch.ones(rows, linear.in_features, dtype=torch.bfloat16)
        linear.crossover_rows = None
        packed = _time(linear, x)
        linear.crossover_rows = 1
        wins = wins + 1 if _time(linear, x) < packed else 0
        if wins == 2:
            return _ROW_COUNTS[index - 1]
    return _ROW_COUNTS[-1]


def _time(linear: Int4PackLinear, x: torch.Tensor) -> float:
    linear(x)
    samples = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        linear(x)
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def _host_key(artifact_digest: str) -> str:
    facts = (artifact_digest, _processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__,
             str(os.cpu_count()), str(torch.get_num_threads()))  # fmt: skip
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def _processor() -> str:
    """The processor's name; Linux alone tells it, and only in a file."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _recall(path: Path | None) -> int | None:
    if path is None:
        return None
    try:
        rows = json.loads(path.read_bytes())["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never measured, or not by us: measure
    return rows if isinstance(rows, int) and 1 <= rows <= _ROW_COUNTS[-1] else None


def _remember(path: Path | None, rows: int) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"rows": rows}, file)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        _log.warning("crossover figure not kept in %s: %s", path, error)
