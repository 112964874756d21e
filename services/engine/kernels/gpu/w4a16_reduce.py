"""The second pass of a split product: partial sums added in order, then what follows the product.

fp32 partial sums [splits, rows, outputs] of `w4a16` are added first split first, always, so the result does
not depend on which program finished when; no atomics. Then bias and residual are added, or activation(gate) *
up is formed, and the result is rounded once. Knows nothing of weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.rounding import is_interpreting, round_to
from services.engine.kernels.gpu.silu_mul import Activation, activate

_BLOCK_N = 512
_NUM_WARPS = 4


@triton.jit
def _sum_splits(partial_ptrs, stride_split, mask, NUM_SPLITS: tl.constexpr):
    total = tl.load(partial_ptrs, mask=mask, other=0.0)
    for split in tl.static_range(1, NUM_SPLITS):
        total += tl.load(partial_ptrs + split * stride_split, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _w4a16_reduce_kernel(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    out_features,
    NUM_SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = out_features // 2 if ACTIVATION != "" else out_features
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < width
    stride_split = num_rows.to(tl.int64) * out_features
    partial_ptrs = partial_ptr + row * out_features + column
    y = _sum_splits(partial_ptrs, stride_split, mask, NUM_SPLITS)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        up = _sum_splits(partial_ptrs + width, stride_split, mask, NUM_SPLITS)
        if bias_ptr is not None:
            up += tl.load(bias_ptr + width + column, mask=mask, other=0.0).to(tl.float32)
        y = activate(y, ACTIVATION) * up
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, round_to(y, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


def w4a16_reduce(
    partial: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation | None = None,
) -> Tensor:
    """Sum fp32 partial [splits, rows, outputs] over splits into out [rows, outputs], or with an `activation`
    into out [rows, outputs / 2] = activation(first half) * second half.

    `bias` [outputs] is added first; `residual`, of out's shape, last. All contiguous; ValueError if not.
    """
    num_splits, num_rows, out_features = partial.shape
    width = out_features // 2 if activation else out_features
    if out.shape != (num_rows, width) or partial.dtype != torch.float32:
        raise ValueError(f"partial sums {tuple(partial.shape)} do not reduce to {tuple(out.shape)}")
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise ValueError(f"residual {tuple(residual.shape)} does not fit {tuple(out.shape)}")
    if not (partial.is_contiguous() and out.is_contiguous()):
        raise ValueError("partial sums and output must be contiguous")
    grid = (num_rows, triton.cdiv(width, _BLOCK_N))
    _w4a16_reduce_kernel[grid](
        partial,
        bias,
        residual,
        out,
        num_rows,
        out_features,
        NUM_SPLITS=num_splits,
        ACTIVATION=activation or "",
        BLOCK_N=_BLOCK_N,
        INTERPRET=is_interpreting(),
        num_warps=_NUM_WARPS,
    )
    return out


def compile_cases() -> list[CompileCase]:
    """Sums over 2, 8 and 16 splits, and the epilogues of an MLP's gate."""
    cases = []
    for num_splits, activation in ((2, ""), (8, ""), (16, ""), (4, "silu"), (4, "gelu")):
        pointers = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
        constexprs: dict[str, object] = {"NUM_SPLITS": num_splits, "ACTIVATION": activation}
        constexprs |= {"BLOCK_N": _BLOCK_N, "INTERPRET": False}
        if activation:
            constexprs["residual_ptr"] = None
        else:
            pointers["residual_ptr"] = "*bf16"
        cases.append(
            CompileCase(
                name=f"w4a16_reduce/splits{num_splits}{f'/{activation}' if activation else ''}",
                kernel=_w4a16_reduce_kernel,
                signature={**pointers, "num_rows": "i32", "out_features": "i32"},
                constexprs=constexprs,
                num_warps=_NUM_WARPS,
                num_stages=1,
                unaligned=frozenset({"num_rows"}),
            )
        )
    return cases
