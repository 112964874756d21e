"""Adds the splits of `paged_decode` in order: each with the weight that its share of the softmax gives it.

Knows splits and contexts, not the cache. A split that a context does not reach was never written, and is
never read: so a bound that is larger than the context changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.paged_decode_tile import splits_of

CHUNK = 8
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["lse_ptr", "context_lens_ptr"])
def _paged_decode_reduce_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    context_lens_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    sequence = tl.program_id(0)
    row = sequence.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    context = tl.load(context_lens_ptr + sequence)
    splits, _ = splits_of(context, num_splits, SPLIT, WINDOW)
    index, element = tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    lse_ptr += row * num_splits
    partial_ptr += row * num_splits * HEAD_DIM

    largest = float("-inf")
    for first in range(0, splits, CHUNK):
        lse = tl.load(lse_ptr + first + index, mask=first + index < splits, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(lse, 0))
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, splits, CHUNK):
        split = first + index
        lse = tl.load(lse_ptr + split, mask=split < splits, other=float("-inf"))
        share = tl.exp2(lse - largest)
        mask = (split < splits)[:, None] & (element < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + split[:, None] * HEAD_DIM + element[None, :], mask=mask, other=0.0)
        total += tl.sum(share, 0)
        acc += tl.sum(partial * share[:, None], 0)
    # A padding row has no split: zeros.
    acc = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + element, acc, mask=element < HEAD_DIM)


def paged_decode_reduce(
    partial: Tensor,
    lse: Tensor,
    context_lens: Tensor,
    out: Tensor,
    num_splits: int,
    split_size: int,
    sliding_window: int | None = None,
) -> None:
    """Write out [num_seqs, heads, head_dim] from fp32 partial [num_seqs, heads, num_splits, head_dim] and lse
    [num_seqs, heads, num_splits], the base-2 logarithm of the sum of weights behind each partial result.
    """
    num_seqs, num_heads, head_dim = out.shape
    _paged_decode_reduce_kernel[(num_seqs, num_heads)](
        out,
        partial,
        lse,
        context_lens,
        num_splits,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        SPLIT=split_size,
        WINDOW=sliding_window or 0,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )


def compile_cases() -> list[CompileCase]:
    """The launches of models that are served."""
    return [
        CompileCase(
            name=f"paged_decode_reduce/{dtype}/head_dim{head_dim}",
            kernel=_paged_decode_reduce_kernel,
            signature={
                "out_ptr": f"*{dtype}",
                "partial_ptr": "*fp32",
                "lse_ptr": "*fp32",
                "context_lens_ptr": "*i32",
                "num_splits": "i32",
            },
            constexprs={
                "HEAD_DIM": head_dim,
                "BLOCK_D": triton.next_power_of_2(head_dim),
                "SPLIT": 512,
                "WINDOW": 0,
                "CHUNK": CHUNK,
            },
            num_warps=NUM_WARPS,
            num_stages=3,
            unaligned=frozenset({"num_splits", "lse_ptr", "context_lens_ptr"}),
        )
        for dtype, head_dim in (("bf16", 128), ("fp16", 96))
    ]
