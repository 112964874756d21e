"""Scores within a cap, inside the attention kernels. Device functions only; does not know whose scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def capped(x, unit, CAP: tl.constexpr, INTERPRET: tl.constexpr):
    """c tanh(s / c) log2(e) with c = CAP, for a softmax by powers of two, of s = x * unit * c / (2 log2(e)).

    tanh(y) = 1 - 2 / (exp(2 y) + 1), where an exp that is infinite gives 1. Five instructions a score.
    """
    LIMIT: tl.constexpr = CAP * 1.4426950408889634
    total = tl.exp2(x * unit) + 1.0
    if INTERPRET:
        share = 1.0 / total
    else:
        # Of a number not below 1: what a division does for the whole range is not wanted.
        share = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.fma(share, -2.0 * LIMIT, LIMIT)
