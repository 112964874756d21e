"""Rows of a table by index: token embeddings, and the rows whose logits are wanted. Copies, no arithmetic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase

_BLOCK = 2048
_NUM_WARPS = 4


@triton.jit(do_not_specialize_on_alignment=["index_ptr"])
def _gather_rows_kernel(table_ptr, index_ptr, out_ptr, stride_table_n, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    index = tl.load(index_ptr + row).to(tl.int64)
    values = tl.load(table_ptr + index * stride_table_n + columns, mask=is_inside)
    tl.store(out_ptr + row * width + columns, values, mask=is_inside)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows [n] (int64 or int32, each within x) of x [rows, width] -> [n, width].

    Raises ValueError for other shapes.
    """
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[1] < 1:
        raise ValueError(f"x must be [rows, width] with rows that lie together, found {tuple(x.shape)}")
    if rows.dim() != 1 or not rows.is_contiguous() or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be one row of integers, found {rows.dtype} {tuple(rows.shape)}")
    width = x.shape[1]
    out = torch.empty((rows.shape[0], width), dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        block = _block(width)
        _gather_rows_kernel[(rows.shape[0], triton.cdiv(width, block))](
            x, rows, out, x.stride(0), width, BLOCK=block, num_warps=_NUM_WARPS
        )
    return out


def embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows of `table` [vocab, hidden] for ids [rows], each within the vocabulary."""
    return gather_rows(table, token_ids)


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))


def compile_cases() -> list[CompileCase]:
    """The widths of models of today, and an odd one."""
    return [
        CompileCase(
            name=f"gather_rows/hidden{width}",
            kernel=_gather_rows_kernel,
            signature={
                "table_ptr": "*bf16",
                "index_ptr": "*i64",
                "out_ptr": "*bf16",
                "stride_table_n": "i32",
                "width": "i32",
            },
            constexprs={"BLOCK": _block(width)},
            num_warps=_NUM_WARPS,
            num_stages=3,
            unaligned=frozenset(
                {"index_ptr"} if width % 16 == 0 else {"index_ptr", "stride_table_n", "width"}
            ),
        )
        for width in (63, 4096)
    ]
