"""Unquantised linears: the vendor's matmul, or a product of our own whose sums run in one order always.

The vendor's library picks a kernel, and with it an order of summation, by the number of rows. Where a row's
bits must be the same in every batch, `dense_linear` takes one tile and one split of the inputs for all row
counts: the sum of an output runs over its inputs in the same order whatever rows are beside it. Knows one
weight [out, in]; no model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.launch_configs import (
    DENSE_TILE,
    DENSE_TILE_FP32,
    LaunchConfig,
    choose_fixed_splits,
    rows_per_launch,
)
from services.engine.kernels.gpu.rounding import is_interpreting, round_to
from services.engine.kernels.gpu.w4a16_reduce import w4a16_reduce
from services.engine.kernels.numerics import Numerics


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
def _dense_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    blocks_per_split,
    stride_x_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program: BLOCK_N outputs of BLOCK_M rows, over one split of the inputs, as y^T = W x^T."""
    pid_m, pid_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = split * blocks_per_split
    stop = tl.minimum(start + blocks_per_split, tl.cdiv(in_features, BLOCK_K))
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row, is_output = rows[None, :] < num_rows, n < out_features
    x_ptrs = x_ptr + rows[None, :].to(tl.int64) * stride_x_m + k[:, None]
    # Outputs that do not exist repeat the last one that does, and are not stored.
    weight_rows = tl.minimum(n, out_features - 1)[:, None].to(tl.int64)
    weight_ptrs = weight_ptr + weight_rows * in_features + k[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(start, stop, num_stages=NUM_STAGES):
        offset = block * BLOCK_K
        if EVEN_K:
            weight = tl.load(weight_ptrs + offset)
            x = tl.load(x_ptrs + offset, mask=is_row, other=0.0)
        else:
            is_input = offset + k < in_features
            weight = tl.load(weight_ptrs + offset, mask=is_input[None, :], other=0.0)
            x = tl.load(x_ptrs + offset, mask=is_row & is_input[:, None], other=0.0)
        if INTERPRET:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(weight, x, acc, input_precision="ieee")

    offsets = rows[None, :].to(tl.int64) * out_features + n[:, None]
    mask = is_row & is_output[:, None]
    if IS_PARTIAL:
        base = split.to(tl.int64) * num_rows * out_features
        tl.store(out_ptr + base + offsets, acc, mask=mask)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, round_to(acc, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x [rows, in] times weight [out, in] transposed -> [rows, out], plus bias [out], plus residual
    [rows, out]; summed in fp32, rounded once, and a row's bits do not depend on the other rows.

    ValueError if shapes, strides or types do not fit.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    if weight.shape[1] != in_features or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"x {x.dtype} {tuple(x.shape)} does not fit weight {weight.dtype} {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit {out_features} outputs")
    if residual is not None and (residual.shape != (num_rows, out_features) or not residual.is_contiguous()):
        raise ValueError(f"residual {tuple(residual.shape)} is not [{num_rows}, {out_features}]")
    x = x if x.stride(1) == 1 else x.contiguous()
    tile = DENSE_TILE_FP32 if x.dtype == torch.float32 else DENSE_TILE
    num_splits = choose_fixed_splits(tile, out_features, in_features, 8 * weight.itemsize)
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    step = rows_per_launch(tile, num_splits, out_features) if num_splits > 1 else max(num_rows, 1)
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        part = None if residual is None else residual[rows]
        _dense_chunk(x[rows], weight, bias, part, out[rows], tile, num_splits)
    return out


def _dense_chunk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    tile: LaunchConfig,
    num_splits: int,
) -> None:
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    is_partial = num_splits > 1
    target = out
    if is_partial:
        target = torch.empty((num_splits, num_rows, out_features), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_rows, tile.block_m), triton.cdiv(out_features, tile.block_n), num_splits)
    _dense_linear_kernel[grid](
        x,
        weight,
        None if is_partial else bias,
        None if is_partial else residual,
        target,
        num_rows,
        in_features,
        out_features,
        triton.cdiv(triton.cdiv(in_features, tile.block_k), num_splits),
        x.stride(0),
        **_constexprs(tile, in_features),
        IS_PARTIAL=is_partial,
        INTERPRET=is_interpreting(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if is_partial:
        w4a16_reduce(target, out, bias=bias, residual=residual)


def _constexprs(tile: LaunchConfig, in_features: int) -> dict[str, object]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "EVEN_K": in_features % tile.block_k == 0,
        "NUM_STAGES": tile.num_stages,
    }


class GpuDenseLinear:
    """An unquantised linear. `weight` [out, in] and `bias` [out] are kept in the type of the activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None, numerics: Numerics) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = weight.to(numerics.dtype).contiguous()
        self.bias = None if bias is None else bias.to(numerics.dtype).contiguous()
        self.num_bytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        self.path = "dense-fixed" if numerics.is_deterministic else "dense"
        self._is_deterministic = numerics.is_deterministic

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out], plus residual [rows, out]."""
        return linear_with_residual(x, self.weight, self.bias, residual, self._is_deterministic)


def linear_with_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, is_deterministic: bool
) -> Tensor:
    """x times weight [out, in] transposed, plus bias and residual where there is one."""
    if is_deterministic:
        return dense_linear(x, weight, bias, residual)
    if residual is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.addmm(residual, x, weight.t())
    return F.linear(x, weight, bias).add_(residual)


def compile_cases() -> list[CompileCase]:
    """The one tile: partial sums, finished sums, inputs that end within a tile, fp16 and fp32."""
    return [
        _case("partial", "bf16", DENSE_TILE, is_partial=True),
        _case("finished", "bf16", DENSE_TILE),
        _case("uneven", "bf16", DENSE_TILE, is_even=False),
        _case("fp16", "fp16", DENSE_TILE),
        _case("fp32", "fp32", DENSE_TILE_FP32),
    ]


def _case(
    name: str, dtype: str, tile: LaunchConfig, *, is_partial: bool = False, is_even: bool = True
) -> CompileCase:
    sizes = ("num_rows", "in_features", "out_features", "blocks_per_split", "stride_x_m")
    signature = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    constexprs = _constexprs(tile, 256 if is_even else 200)
    constexprs |= {"IS_PARTIAL": is_partial, "INTERPRET": False}
    if is_partial:
        signature["out_ptr"] = "*fp32"
        constexprs |= {"bias_ptr": None, "residual_ptr": None}
    else:
        signature |= {"bias_ptr": f"*{dtype}", "residual_ptr": f"*{dtype}"}
    return CompileCase(
        name=f"dense_linear/{name}",
        kernel=_dense_linear_kernel,
        signature={**signature, **dict.fromkeys(sizes, "i32")},
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        unaligned=frozenset({"num_rows", "blocks_per_split"}),
        elements_per_iteration=tile.block_n * tile.block_k,
        has_tensor_cores=dtype != "fp32",
    )
