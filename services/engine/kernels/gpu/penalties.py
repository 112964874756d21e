"""Repetition, frequency and presence penalties over a vocabulary, in place, from counts kept on the device.

The formulas and their order are those of `services.engine.runner.penalties`. Knows rows and counts; not whose
they are, nor when a token was drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase

IN_PROMPT = 1 << 30
"""The bit of a count that says the id is in the prompt; what is below it counts the output."""
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _penalize_kernel(
    logits_ptr,
    counts_ptr,
    rows_ptr,
    strengths_ptr,
    vocab_size,
    stride_logits,
    stride_counts,
    IN_PROMPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = rows_ptr + tl.program_id(0) * 2
    row, slot = tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64)
    strengths = strengths_ptr + tl.program_id(0) * 3
    repetition, frequency, presence = tl.load(strengths), tl.load(strengths + 1), tl.load(strengths + 2)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    logit_ptrs = logits_ptr + row * stride_logits + ids
    logits = tl.load(logit_ptrs, mask=mask, other=0.0)
    packed = tl.load(counts_ptr + slot * stride_counts + ids, mask=mask, other=0)
    count = (packed & (IN_PROMPT - 1)).to(tl.float32)
    repeated = tl.where(
        logits > 0, tl.div_rn(logits, repetition + tl.zeros_like(logits)), logits * repetition
    )
    logits = tl.where(packed != 0, repeated, logits)
    logits = logits - frequency * count
    logits = tl.where(count > 0, logits - presence, logits)
    tl.store(logit_ptrs, logits, mask=mask)


def penalize(logits: Tensor, counts: Tensor, rows: Tensor, strengths: Tensor) -> None:
    """Change some rows of logits in place.

    Args:
        logits: fp32 [n, vocab], rows contiguous.
        counts: int32 [slots, vocab]: how often an id was drawn, plus `IN_PROMPT` if the prompt holds it.
        rows: int32 [m, 2]: a row of the logits, once at most, and its slot in the counts.
        strengths: fp32 [m, 3]: repetition, frequency, presence.

    Raises ValueError for other shapes or types.
    """
    vocab_size = logits.shape[1]
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be fp32 with contiguous rows, found {logits.dtype}")
    if counts.dtype != torch.int32 or counts.dim() != 2 or counts.shape[1] != vocab_size:
        raise ValueError(f"counts must be int32 [slots, {vocab_size}], found {tuple(counts.shape)}")
    if rows.dtype != torch.int32 or rows.shape != (len(strengths), 2) or strengths.shape[1:] != (3,):
        raise ValueError(f"expected rows int32 [m, 2] and strengths [m, 3], found {tuple(rows.shape)}")
    if not len(rows):
        return
    grid = (len(rows), triton.cdiv(vocab_size, _BLOCK))
    _penalize_kernel[grid](
        logits,
        counts,
        rows,
        strengths,
        vocab_size,
        logits.stride(0),
        counts.stride(0),
        IN_PROMPT=IN_PROMPT,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
        # A multiplication and a subtraction round twice, as on the CPU; fused they would round once.
        enable_fp_fusion=False,
    )


def compile_cases() -> list[CompileCase]:
    """The launch, for a vocabulary of any size."""
    return [
        CompileCase(
            name="penalties",
            kernel=_penalize_kernel,
            signature={
                "logits_ptr": "*fp32",
                "counts_ptr": "*i32",
                "rows_ptr": "*i32",
                "strengths_ptr": "*fp32",
                "vocab_size": "i32",
                "stride_logits": "i32",
                "stride_counts": "i32",
            },
            constexprs={"IN_PROMPT": IN_PROMPT, "BLOCK": _BLOCK},
            num_warps=_NUM_WARPS,
            num_stages=3,
            has_fp_fusion=False,
        )
    ]
