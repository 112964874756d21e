"""The device's two ceilings: what a large copy moves, what a large bf16 product computes. Every share in the
other phases is of a copy measured there and then; these rows say what machine it was.
"""

from __future__ import annotations

import torch

from benchmarks.gpu_measure import Bench, Row


def run(bench: Bench) -> None:
    """Emit the ceilings."""
    with bench.case("copy bandwidth"):
        num_bytes = (1 << 16) if bench.is_dry else (2 << 30)
        source = bench.randint(256, num_bytes, dtype=torch.uint8)
        target = torch.empty_like(source)
        rate = bench.time([lambda: target.copy_(source)]).rate(2 * num_bytes / 1e9)
        bench.emit(Row(bench.name, "device copy", "GB/s", rate.median, rate.p20, rate.p80))
    with bench.case("bf16 product"):
        size = 64 if bench.is_dry else 8192
        a, b = bench.randn(size, size), bench.randn(size, size)
        rate = bench.time([lambda: torch.mm(a, b)]).rate(2 * size**3 / 1e12)
        bench.emit(Row(bench.name, f"cuBLAS product {size}^3", "TFLOP/s", rate.median, rate.p20, rate.p80))
