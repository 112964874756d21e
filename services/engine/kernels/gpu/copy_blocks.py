"""Copies the leading slots of cache blocks to other blocks, in all layers at once.

Knows the places of slots in one tensor of the cache; not what is stored there, nor who owns it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase

_BLOCK = 2048
_NUM_WARPS = 4


@triton.jit(do_not_specialize_on_alignment=["copies_ptr"])
def _copy_blocks_kernel(
    stored_ptr,
    copies_ptr,
    stride_layer,
    stride_block,
    stride_head,
    slot_size,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    copy = copies_ptr + tl.program_id(0) * 3
    source, destination = tl.load(copy).to(tl.int64), tl.load(copy + 1).to(tl.int64)
    size = tl.load(copy + 2) * slot_size
    layer, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    head_ptr = stored_ptr + layer * stride_layer + head * stride_head
    # A head's slots lie together, so the leading ones are one span.
    units = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(head_ptr + source * stride_block + units, mask=units < size)
    tl.store(head_ptr + destination * stride_block + units, values, mask=units < size)


def copy_blocks(stored: Tensor, copies: Tensor) -> None:
    """Copy within one tensor of the cache, in place; a quantised cache's params are another call.

    Args:
        stored: [layers, 2, num_blocks, kv_heads, block_size] or with the values of a slot last; contiguous.
        copies: int32 [n, 3] on the same device: source block, destination block, leading slots. They run side
            by side: no block is the destination of two, nor the destination of one and the source of another.

    Raises ValueError for other shapes.
    """
    if stored.dim() not in (5, 6) or not stored.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor of five or six dimensions, found {tuple(stored.shape)}"
        )
    if copies.dim() != 2 or copies.shape[1] != 3 or copies.dtype != torch.int32 or not copies.is_contiguous():
        raise ValueError(f"copies must be int32 [n, 3], found {copies.dtype} {tuple(copies.shape)}")
    words = _words(stored if stored.dim() == 6 else stored.unsqueeze(-1))
    layers, sides, _, heads, block_size, slot_size = words.shape
    if copies.shape[0]:
        block = _block(block_size * slot_size)
        grid = (copies.shape[0], layers * sides * heads, triton.cdiv(block_size * slot_size, block))
        _copy_blocks_kernel[grid](
            words,
            copies,
            words.stride(1),
            words.stride(2),
            words.stride(3),
            slot_size,
            HEADS=heads,
            BLOCK=block,
            num_warps=_NUM_WARPS,
        )


def _words(stored: Tensor) -> Tensor:
    """The same memory in the largest integers that a slot is a multiple of."""
    slot_bytes = stored.shape[-1] * stored.element_size()
    for dtype in (torch.int32, torch.int16):
        if slot_bytes % dtype.itemsize == 0:
            return stored.view(dtype)
    return stored.view(torch.uint8)


def _block(head_size: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(head_size))


def compile_cases() -> list[CompileCase]:
    """Codes of a Llama 3 8B cache, and its params."""
    return [
        CompileCase(
            name=f"copy_blocks/{name}",
            kernel=_copy_blocks_kernel,
            signature={
                "stored_ptr": "*i32",
                "copies_ptr": "*i32",
                "stride_layer": "i64",
                "stride_block": "i32",
                "stride_head": "i32",
                "slot_size": "i32",
            },
            constexprs={"HEADS": 8, "BLOCK": _block(128 * slot_size)},
            num_warps=_NUM_WARPS,
            num_stages=3,
            unaligned=frozenset({"copies_ptr"} if slot_size > 1 else {"copies_ptr", "slot_size"}),
        )
        for name, slot_size in (("int8", 32), ("params", 1))
    ]
