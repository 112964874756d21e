"""A row as the kernels of sampling read it: its parameters, and its logits as integers that rank as they do.

Device functions only. Knows the words of `sampling.draw`'s parameters; filters and draws nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LOWEST_KEY = tl.constexpr(-(2**31))
"""Below the key of every logit."""
ALL = tl.constexpr(2**31 - 1)
"""As a largest id, or a number of ids, that is kept: no bound. Above the key of every logit."""
_MIN_TEMPERATURE = tl.constexpr(2.0**-120)
"""Temperatures between 0 and this are taken as this, so that reciprocals are finite."""


@triton.jit
def load_temperature(params_ptr):
    """fp32 temperature of a row's params; 0 for a greedy row."""
    temperature = tl.load(params_ptr).to(tl.float32, bitcast=True)
    return tl.where(temperature > 0, tl.maximum(temperature, _MIN_TEMPERATURE), 0.0)


@triton.jit
def load_top_k(params_ptr, vocab):
    """top_k of a row's params; 0 where it leaves nothing out."""
    top_k = tl.load(params_ptr + 1)
    return tl.where((top_k > 0) & (top_k < vocab), top_k, 0)


@triton.jit
def load_float(params_ptr, word: tl.constexpr):
    """The word of a row's params that holds the bits of an fp32."""
    return tl.load(params_ptr + word).to(tl.float32, bitcast=True)


@triton.jit
def rank_key(x):
    """int32 of the same order as fp32 x, which is no NaN; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """fp32 of a `rank_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
