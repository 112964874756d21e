"""How fast this machine's memory is read and copied: the bound on decoding one sequence.

    python -m benchmarks.cpu_bandwidth THREADS [MEBIBYTES]

Prints one JSON object, bytes per second: the best of several passes over a buffer far larger than the caches.
Knows no model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

PASSES = 9


def best_rate(work: Callable[[], object], num_bytes: int) -> float:
    """Bytes per second of the fastest pass: what is in the way only ever slows one down."""
    work()
    seconds = []
    for _ in range(PASSES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return num_bytes / min(seconds)


def measure(threads: int, mebibytes: int = 512) -> dict[str, float]:
    """`read`: the faster of a sum and a dot product with itself; `copy`: bytes read and bytes written."""
    torch.set_num_threads(threads)
    source = torch.ones(mebibytes << 18)
    target = torch.empty_like(source)
    read = max(
        best_rate(source.sum, source.nbytes),
        best_rate(lambda: torch.dot(source, source), source.nbytes),
        best_rate(lambda: source.view(threads, -1).amax(1), source.nbytes),
    )
    return {"read": read, "copy": best_rate(lambda: target.copy_(source), 2 * source.nbytes)}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), *(int(value) for value in sys.argv[2:3]))))
