"""The kernel of `rotary_write`. Device functions only: knows pointers, strides and tile sizes.

One program holds a few heads of one row. Queries it rotates into a fresh tensor; keys it rotates, values it
takes as they are, and both go through `kv_store`, which knows the cache's formats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.kv_store import store_heads
from services.engine.kernels.gpu.rounding import round_to


@triton.jit
def _rotate(
    first,
    second,
    row,
    pairs,
    is_pair,
    cos_ptr,
    sin_ptr,
    norm_ptr,
    eps,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Both halves of heads [heads, pairs] in fp32, normed if there is a weight, rotated, rounded to DTYPE."""
    # Each head's copy of what all heads share is loaded as it is used: L1 serves it, and the layout needs no
    # exchange through shared memory.
    shared = pairs[None, :] + tl.zeros(first.shape, tl.int32)
    is_shared = is_pair[None, :]
    if HAS_NORM:
        mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean_square + eps)[:, None]
        first_weight = tl.load(norm_ptr + shared, mask=is_shared, other=0.0).to(tl.float32)
        second_weight = tl.load(norm_ptr + HALF + shared, mask=is_shared, other=0.0).to(tl.float32)
        first, second = first * scale, second * scale
        if norm_ptr.dtype.element_ty == DTYPE:
            first = round_to(first, DTYPE, INTERPRET).to(tl.float32)
            second = round_to(second, DTYPE, INTERPRET).to(tl.float32)
        first = round_to(first * first_weight, DTYPE, INTERPRET).to(tl.float32)
        second = round_to(second * second_weight, DTYPE, INTERPRET).to(tl.float32)
    cos = tl.load(cos_ptr + row * HALF + shared, mask=is_shared, other=0.0)
    sin = tl.load(sin_ptr + row * HALF + shared, mask=is_shared, other=0.0)
    return (
        round_to(first * cos - second * sin, DTYPE, INTERPRET),
        round_to(second * cos + first * sin, DTYPE, INTERPRET),
    )


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def rotary_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_params_ptr,
    v_params_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    stride_q_n,
    stride_q_h,
    stride_k_n,
    stride_k_h,
    stride_v_n,
    stride_v_h,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    CACHE_DTYPE: tl.constexpr,
    HAS_ROTARY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    q_tiles: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    kv_tiles: tl.constexpr = (NUM_KV_HEADS + BLOCK_H - 1) // BLOCK_H
    pairs = tl.arange(0, BLOCK_PAIRS)
    is_pair = pairs < HALF
    if tile < q_tiles:
        heads = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        is_value = (heads < NUM_HEADS)[:, None] & is_pair[None, :]
        source = q_ptr + row * stride_q_n + heads[:, None] * stride_q_h + pairs[None, :]
        first = tl.load(source, mask=is_value, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=is_value, other=0.0).to(tl.float32)
        first, second = _rotate(
            first,
            second,
            row,
            pairs,
            is_pair,
            cos_ptr,
            sin_ptr,
            q_norm_ptr,
            eps,
            HALF,
            HAS_NORM,
            DTYPE,
            INTERPRET,
        )
        target = out_ptr + (row * NUM_HEADS + heads[:, None]) * (2 * HALF) + pairs[None, :]
        tl.store(target, first, mask=is_value)
        tl.store(target + HALF, second, mask=is_value)
    else:
        is_key = tile < q_tiles + kv_tiles
        heads = (tile - q_tiles - tl.where(is_key, 0, kv_tiles)) * BLOCK_H + tl.arange(0, BLOCK_H)
        is_head = heads < NUM_KV_HEADS
        is_value = is_head[:, None] & is_pair[None, :]
        slot = tl.load(slot_ptr + row).to(tl.int64)
        if is_key:
            source = k_ptr + row * stride_k_n + heads[:, None] * stride_k_h + pairs[None, :]
            first = tl.load(source, mask=is_value, other=0.0)
            second = tl.load(source + HALF, mask=is_value, other=0.0)
            if HAS_ROTARY:
                first, second = _rotate(
                    first.to(tl.float32), second.to(tl.float32), row, pairs, is_pair, cos_ptr, sin_ptr,
                    k_norm_ptr, eps, HALF, HAS_NORM, DTYPE, INTERPRET,
                )  # fmt: skip
            store_heads(
                k_cache_ptr, k_params_ptr, first, second, slot, heads, pairs, is_head, is_pair, NUM_KV_HEADS,
                BLOCK_SIZE, HALF, FORMAT, CACHE_DTYPE, HAS_FP8, BLOCK_H, BLOCK_PAIRS, INTERPRET,
            )  # fmt: skip
        else:
            source = v_ptr + row * stride_v_n + heads[:, None] * stride_v_h + pairs[None, :]
            first = tl.load(source, mask=is_value, other=0.0)
            second = tl.load(source + HALF, mask=is_value, other=0.0)
            store_heads(
                v_cache_ptr, v_params_ptr, first, second, slot, heads, pairs, is_head, is_pair, NUM_KV_HEADS,
                BLOCK_SIZE, HALF, FORMAT, CACHE_DTYPE, HAS_FP8, BLOCK_H, BLOCK_PAIRS, INTERPRET,
            )  # fmt: skip
