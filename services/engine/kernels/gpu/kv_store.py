"""Heads of keys or values into their slot of a cache of any format: device functions.

Each head is quantised by itself, from fp32, as `reference.write_kv` does it, to the bit. Knows slots; not
what was done to a head before, nor who owns a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.rounding import (
    bfloat16_above,
    bfloat16_below,
    float8_e4m3,
    round_half_even,
    round_to,
)
from services.engine.kernels.kv_format import FP8_MAX, MIN_SCALE

_MIN_SCALE = tl.constexpr(MIN_SCALE)
_FP8_MAX = tl.constexpr(FP8_MAX)
_NAN = tl.constexpr(0x7FC0)


@triton.jit
def _quantize_params(first, second, is_pair, FORMAT: tl.constexpr):
    """(scale, minimum, packed bits) of fp32 heads [heads, pairs] twice; NaN where a value is not finite."""
    # Maxima and minima pass over a NaN, so what is not finite is looked for in the exponents.
    exponents = tl.maximum(
        first.to(tl.int32, bitcast=True) & 0x7F800000, second.to(tl.int32, bitcast=True) & 0x7F800000
    )
    is_bad = tl.max(exponents, 1) == 0x7F800000
    if FORMAT == "fp8":
        # What lies outside of the head is zero, and so below every magnitude.
        extent = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1)
        max_code: tl.constexpr = _FP8_MAX
        minimum_bits = tl.zeros(extent.shape, tl.int32)
    else:
        lowest = tl.where(is_pair[None, :], tl.minimum(first, second), float("inf"))
        highest = tl.where(is_pair[None, :], tl.maximum(first, second), float("-inf"))
        minimum_bits = bfloat16_below(tl.min(lowest, 1) + 0.0)
        extent = tl.max(highest, 1) - minimum_bits.to(tl.float32, bitcast=True)
        max_code: tl.constexpr = 255.0 if FORMAT == "int8" else 15.0
    step = tl.div_rn(extent, tl.full(extent.shape, max_code, tl.float32))
    scale_bits = bfloat16_above(tl.maximum(step, _MIN_SCALE))
    # The extent of finite numbers may be infinite.
    is_bad = is_bad | ((scale_bits & 0x7F800000) == 0x7F800000)
    scale_bits = tl.where(is_bad, _NAN << 16, scale_bits)
    if FORMAT != "fp8":
        minimum_bits = tl.where(is_bad, _NAN << 16, minimum_bits)
    packed = ((scale_bits >> 16) & 0xFFFF) | minimum_bits
    return scale_bits.to(tl.float32, bitcast=True), minimum_bits.to(tl.float32, bitcast=True), packed


@triton.jit
def _encode(x, scale, minimum, FORMAT: tl.constexpr, HAS_FP8: tl.constexpr):
    """Codes of fp32 x [heads, pairs]: uint8 for fp8, else int32."""
    if FORMAT == "fp8":
        return float8_e4m3(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), HAS_FP8)
    else:
        max_code: tl.constexpr = 255.0 if FORMAT == "int8" else 15.0
        steps = tl.div_rn(x - minimum[:, None], tl.broadcast_to(scale[:, None], x.shape))
        return round_half_even(tl.minimum(tl.maximum(steps, 0.0), max_code))


@triton.jit
def _store_codes(
    target,
    codes,
    units,
    is_head,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """One half of each head: WIDTH values from `target` [heads, 1] on."""
    if FORMAT == "int4":
        low, high = tl.split(tl.reshape(codes, (BLOCK_H, BLOCK_PAIRS // 2, 2)))
        codes = low | (high << 4)
        units = tl.arange(0, BLOCK_PAIRS // 2)
        tl.store(target + units[None, :], codes.to(tl.uint8), mask=is_head & (units < WIDTH // 2)[None, :])
    else:
        tl.store(target + units[None, :], codes.to(tl.uint8), mask=is_head & (units < WIDTH)[None, :])


@triton.jit
def store_heads(
    cache_ptr,
    params_ptr,
    first,
    second,
    slot,
    heads,
    pairs,
    is_head,
    is_pair,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    FORMAT: tl.constexpr,
    CACHE_DTYPE: tl.constexpr,
    HAS_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Both halves of heads [heads, pairs] into the slot."""
    block = slot // BLOCK_SIZE
    vectors = (block * NUM_KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
    row_size: tl.constexpr = HALF if FORMAT == "int4" else 2 * HALF
    target = cache_ptr + (vectors * row_size)[:, None]
    first, second = first.to(tl.float32), second.to(tl.float32)
    if FORMAT == "plain":
        is_value = is_head[:, None] & is_pair[None, :]
        tl.store(target + pairs[None, :], round_to(first, CACHE_DTYPE, INTERPRET), mask=is_value)
        tl.store(target + HALF + pairs[None, :], round_to(second, CACHE_DTYPE, INTERPRET), mask=is_value)
    else:
        scale, minimum, packed = _quantize_params(first, second, is_pair, FORMAT)
        tl.store(params_ptr + vectors, packed, mask=is_head)
        low_codes = _encode(first, scale, minimum, FORMAT, HAS_FP8)
        high_codes = _encode(second, scale, minimum, FORMAT, HAS_FP8)
        upper = target + row_size // 2
        _store_codes(target, low_codes, pairs, is_head[:, None], HALF, FORMAT, BLOCK_H, BLOCK_PAIRS)
        _store_codes(upper, high_codes, pairs, is_head[:, None], HALF, FORMAT, BLOCK_H, BLOCK_PAIRS)
