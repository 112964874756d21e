"""RMSNorm of rows, alone or with the residual addition before it, in one pass over memory.

One program holds one row, whatever rows are beside it: a row's sum of squares has one order, so its bits do
not depend on the batch. Knows rows; not which norm of which layer they belong to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.rounding import TRITON_DTYPES, is_interpreting, round_to

MAX_HIDDEN = 65536
"""A row lies in the registers of one program: at most 64 values to a thread."""
_VALUES_PER_WARP = 512


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    sums_ptr,
    stride_x_n,
    stride_residual_n,
    hidden,
    eps,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < hidden
    x = tl.load(x_ptr + row * stride_x_n + columns, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual_n + columns, mask=is_inside, other=0.0)
        total = round_to(x + residual.to(tl.float32), DTYPE, INTERPRET)
        tl.store(total_ptr + row * hidden + columns, total, mask=is_inside)
        x = total.to(tl.float32)
    # Weights are read before the reduction, so that they arrive while it waits.
    weight = tl.load(weight_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(x * x, 0) / hidden
    scale = tl.rsqrt(mean_square + eps)
    normed = x * scale
    if weight_ptr.dtype.element_ty == DTYPE:
        normed = round_to(normed, DTYPE, INTERPRET).to(tl.float32)
    normed = round_to(normed * weight, DTYPE, INTERPRET)
    tl.store(normed_ptr + row * hidden + columns, normed, mask=is_inside)
    if GROUP:
        num_groups = hidden // GROUP
        groups = tl.arange(0, BLOCK // GROUP)
        sums = tl.sum(tl.reshape(normed.to(tl.float32), (BLOCK // GROUP, GROUP)), 1)
        tl.store(sums_ptr + row * num_groups + groups, sums, mask=groups < num_groups)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, group_size: int | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; [rows, hidden] in x's dtype. It is rounded
    before the weight is multiplied in as well, unless the weight is fp32.

    With `group_size` (a power of two that divides hidden) also fp32 [rows, hidden / group_size]: the sums of
    the rounded result over each group. Raises ValueError for shapes that do not fit.
    """
    normed, _, sums = _launch(x, None, weight, eps, group_size)
    return normed if sums is None else (normed, sums)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, group_size: int | None = None
) -> tuple[Tensor, ...]:
    """(rms_norm(x + residual), x + residual), both in x's dtype; the sum is rounded before it is normed.

    With `group_size` the group sums of `rms_norm` come third.
    """
    normed, total, sums = _launch(x, residual, weight, eps, group_size)
    return (normed, total) if sums is None else (normed, total, sums)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    _check(x, residual, weight, group_size)
    rows, hidden = x.shape
    normed = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    total = normed if residual is None else torch.empty_like(normed)
    sums = None
    if group_size is not None:
        sums = torch.empty((rows, hidden // group_size), dtype=torch.float32, device=x.device)
    if rows == 0:
        return normed, total, sums
    block = _block(hidden, group_size)
    _norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        normed,
        total,
        normed if sums is None else sums,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        hidden,
        eps,
        DTYPE=TRITON_DTYPES[x.dtype],
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        GROUP=group_size or 0,
        INTERPRET=is_interpreting(),
        num_warps=_num_warps(block),
    )
    return normed, total, sums


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, group_size: int | None) -> None:
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_HIDDEN or x.stride(1) != 1:
        raise ValueError(f"x must be [rows, 1..{MAX_HIDDEN}] with rows that lie together, found {_form(x)}")
    is_known = weight.dtype in (x.dtype, torch.float32)
    if weight.shape != x.shape[1:] or not is_known or not weight.is_contiguous():
        raise ValueError(f"the weight of {_form(x)} must be one row like it or fp32, found {_form(weight)}")
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1
    ):
        raise ValueError(f"the residual of {_form(x)} must be like it, found {_form(residual)}")
    if group_size is not None and (
        group_size < 1 or group_size & (group_size - 1) or x.shape[1] % group_size
    ):
        raise ValueError(f"group_size must be a power of two that divides {x.shape[1]}, found {group_size}")


def _form(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} with strides {x.stride()}"


def _block(hidden: int, group_size: int | None) -> int:
    return triton.next_power_of_2(max(hidden, group_size or 1))


def _num_warps(block: int) -> int:
    return min(16, max(1, block // _VALUES_PER_WARP))


def compile_cases() -> list[CompileCase]:
    """The norms of models of today, and of an odd width."""
    return [
        _case(f"{kind}/hidden{hidden}" + (f"/group{group}" if group else ""), hidden, kind, group)
        for kind in ("rms_norm", "add_rms_norm")
        for hidden, group in ((100, 0), (2048, 0), (4096, 0), (4096, 128), (8192, 64), (16384, 128))
    ] + [_case(f"{kind}/hidden3584/fp32", 3584, kind, 0, "*fp32") for kind in ("rms_norm", "add_rms_norm")]


def _case(name: str, hidden: int, kind: str, group: int, weight: str = "*bf16") -> CompileCase:
    block = _block(hidden, group)
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "normed_ptr", "total_ptr"), "*bf16")
    sizes = {"stride_x_n": "i32", "stride_residual_n": "i32", "hidden": "i32"}
    return CompileCase(
        name=name,
        kernel=_norm_kernel,
        signature=pointers
        | {"weight_ptr": weight}
        | {"sums_ptr": "*fp32" if group else "*bf16"}
        | sizes
        | {"eps": "fp32"},
        constexprs={
            "DTYPE": tl.bfloat16,
            "BLOCK": block,
            "HAS_RESIDUAL": kind == "add_rms_norm",
            "GROUP": group,
            "INTERPRET": False,
        },
        num_warps=_num_warps(block),
        num_stages=3,
        unaligned=frozenset({"eps"} if hidden % 16 == 0 else {"eps", *sizes}),
    )
