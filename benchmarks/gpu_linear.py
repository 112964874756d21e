"""4-bit linears against cuBLAS in bfloat16: one 8192 x 8192 weight and the shapes of an 8B Llama.

The same launches as in the engine, on random weights of the true shape; enough copies of each weight are used
in turn that none is in the L2 cache when its turn comes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_measure import Bench, Timing
from services.engine.kernels.linear import Linear
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

GROUP = 128
# name -> (in, out, whether it is the gate and up projection, whose output goes through silu * mul)
SHAPES = {
    "8192x8192": (8192, 8192, False),
    "8B qkv 4096x6144": (4096, 6144, False),
    "8B output 4096x4096": (4096, 4096, False),
    "8B gate_up 4096x28672": (4096, 28672, True),
    "8B down 14336x4096": (14336, 4096, False),
}
DRY_SHAPES = {"256x384": (256, 384, False), "gate_up 128x512": (128, 512, True)}
ROWS = (1, 16, 64, 256, 1024, 4096)
TARGETS = {1: 2.8, 16: 2.6, 64: 1.8, 256: 0.95, 1024: 0.9, 4096: 0.9}
"""Speed over cuBLAS bf16 to reach at 8192 x 8192, by rows."""
TOLERANCE = 1e-2


def run(bench: Bench) -> None:
    """Every shape with every number of rows, and the fused forms of the gate and up projection."""
    for name, (in_features, out_features, is_gated) in (DRY_SHAPES if bench.is_dry else SHAPES).items():
        with bench.case(name):
            int4, dense = _linears(bench, in_features, out_features, is_gated)
            for rows in (1, 16) if bench.is_dry else ROWS:
                with bench.case(f"w4a16 {name} rows={rows}"):
                    _compare(bench, f"w4a16 {name} rows={rows}", int4, dense, rows, _target(name, rows))
                if is_gated and rows <= 256:
                    with bench.case(f"w4a16+silu_mul {name} rows={rows}"):
                        _compare_gated(bench, f"w4a16+silu_mul {name} rows={rows}", int4, dense, rows)


def _target(name: str, rows: int) -> float | None:
    return TARGETS.get(rows) if name == "8192x8192" else None


def _linears(
    bench: Bench, in_features: int, out_features: int, is_gated: bool
) -> tuple[list[Linear], list[Tensor]]:
    """Copies of one 4-bit linear, and of its weight in the benchmark's dtype [out, in]."""
    from services.engine.kernels.gpu.w4a16_linear import GpuInt4Linear

    numerics = Numerics(bench.dtype, is_deterministic=False, device=bench.device)
    scratch = Scratch()
    num_int4 = bench.num_copies(in_features * out_features // 2)
    num_dense = bench.num_copies(in_features * out_features * 2)
    int4: list[Linear] = []
    dense: list[Tensor] = []
    for _ in range(num_int4):
        values = bench.randint(16, in_features, out_features, dtype=torch.uint8)
        zeros = bench.randint(16, in_features // GROUP, out_features, dtype=torch.uint8)
        scales = (torch.rand(zeros.shape, device=bench.device) * 0.01 + 0.001).half()
        int4.append(GpuInt4Linear(values, zeros, scales, None, numerics, scratch, is_gate_up=is_gated))
        if len(dense) < num_dense:
            spread = (part.float().repeat_interleave(GROUP, 0) for part in (zeros, scales))
            zero, scale = spread
            dense.append(((values.float() - zero) * scale).t().contiguous().to(bench.dtype))
    return int4, dense


def _compare(
    bench: Bench, case: str, int4: list[Linear], dense: list[Tensor], rows: int, target: float | None
) -> None:
    x = bench.randn(rows, int4[0].in_features)
    bench.close_to(case, int4[0](x), F.linear(x.float(), dense[0].float()), TOLERANCE)
    timing = bench.time([lambda linear=linear: linear(x) for linear in int4])
    base = bench.time([lambda weight=weight: F.linear(x, weight) for weight in dense])
    bench.compare(case, timing, "cuBLAS bf16", base, target=target, note=_note(int4[0], timing, bench))


def _compare_gated(bench: Bench, case: str, int4: list[Linear], dense: list[Tensor], rows: int) -> None:
    x = bench.randn(rows, int4[0].in_features)
    width = int4[0].out_features // 2

    def plain(weight: Tensor, x: Tensor) -> Tensor:
        gate_up = F.linear(x, weight)
        return F.silu(gate_up[:, :width]) * gate_up[:, width:]

    fused = [linear.silu_mul for linear in int4]  # type: ignore[attr-defined]
    bench.close_to(case, fused[0](x), plain(dense[0].float(), x.float()), 2 * TOLERANCE)
    timing = bench.time([lambda call=call: call(x) for call in fused])
    base = bench.time([lambda weight=weight: plain(weight, x) for weight in dense])
    bench.compare(case, timing, "cuBLAS bf16 + torch silu, mul", base, note=_note(int4[0], timing, bench))


def _note(linear: Linear, timing: Timing, bench: Bench) -> str:
    """What the time means: bytes of the weight per second, as a share of the measured copy."""
    rate = linear.num_bytes / timing.median
    return f"weight read at {rate / 1e9:.0f} GB/s, {100 * rate / bench.copy_bandwidth:.0f}% of a copy"
