"""Between the fused projection and attention, in one launch: per-head norms, rotary, the write of K and V.

One program holds a few heads of one row. Queries it rotates into a fresh tensor; keys it rotates, values it
takes as they are, and both it quantises and stores into the row's slot. What is stored is that of
`reference.rotary_write_kv` to the bit where no norm comes before: the rotation is rounded to the dtype of the
activations and quantised from there, multiplications and additions stay unfused. Knows slots; not sequences,
nor who owns a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.rounding import (
    TRITON_DTYPES,
    bfloat16_above,
    bfloat16_below,
    float8_e4m3,
    has_fp8_conversion,
    is_interpreting,
    round_half_even,
    round_to,
)
from services.engine.kernels.kv_format import FORMATS, FP8_MAX, MIN_SCALE, KVFormat, LayerCache

_HALF_TILE = 512
"""Pairs of values in one program's tile: eight to a thread, so that a half of a bfloat16 head is one 16-byte
load.
"""
_NUM_WARPS = 2
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_FP8_MAX = tl.constexpr(FP8_MAX)
_NAN = tl.constexpr(0x7FC0)


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
def _store_heads(
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


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _rotary_write_kernel(
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
            _store_heads(
                k_cache_ptr, k_params_ptr, first, second, slot, heads, pairs, is_head, is_pair, NUM_KV_HEADS,
                BLOCK_SIZE, HALF, FORMAT, CACHE_DTYPE, HAS_FP8, BLOCK_H, BLOCK_PAIRS, INTERPRET,
            )  # fmt: skip
        else:
            source = v_ptr + row * stride_v_n + heads[:, None] * stride_v_h + pairs[None, :]
            first = tl.load(source, mask=is_value, other=0.0)
            second = tl.load(source + HALF, mask=is_value, other=0.0)
            _store_heads(
                v_cache_ptr, v_params_ptr, first, second, slot, heads, pairs, is_head, is_pair, NUM_KV_HEADS,
                BLOCK_SIZE, HALF, FORMAT, CACHE_DTYPE, HAS_FP8, BLOCK_H, BLOCK_PAIRS, INTERPRET,
            )  # fmt: skip


def rotary_write_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    cache: LayerCache,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Norm and rotate q and k, store k and v, return q.

    Args:
        qkv: [rows, num_heads + 2 * kv_heads, head_dim], any strides but the last.
        cos, sin: fp32 [rows, head_dim / 2]; element i turns with element i + head_dim / 2.
        cache: written in the slots named, and nowhere else. Contiguous.
        slot_mapping: int64 [rows], block * block_size + offset.
        q_norm, k_norm: [head_dim], both or neither, in qkv's dtype or fp32: each head's RMSNorm before the
            rotation, with `eps`, rounded as `reference.rms_norm` does.

    Returns: the query [rows, num_heads, head_dim], contiguous. Raises ValueError for shapes that do not fit.
    """
    rows, head_dim = qkv.shape[0], qkv.shape[-1]
    kv_heads = cache.num_kv_heads
    if qkv.dim() != 3 or qkv.shape[1] != num_heads + 2 * kv_heads or num_heads < 1:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not hold {num_heads} + 2 * {kv_heads} heads")
    for table in (cos, sin):
        if table.shape != (rows, head_dim // 2) or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"cos and sin must be float32 {(rows, head_dim // 2)}, found {tuple(table.shape)}"
            )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must be given together")
    for weight in (q_norm, k_norm):
        if weight is not None and (weight.shape != (head_dim,) or not weight.is_contiguous()):
            raise ValueError(f"a head's norm must be [{head_dim}], found {tuple(weight.shape)}")
    query = torch.empty((rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    key, value = qkv[:, num_heads : num_heads + kv_heads], qkv[:, num_heads + kv_heads :]
    _launch(qkv[:, :num_heads], key, value, query, cos, sin, cache, slot_mapping, q_norm, k_norm, eps)
    return query


def write_kv(key: Tensor, value: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Store K and V [rows, kv_heads, head_dim] unrotated, any strides but the last; see `rotary_write_kv`."""
    if key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ")
    _launch(None, key, value, None, None, None, cache, slot_mapping, None, None, 0.0)


def _launch(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: LayerCache,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    _check(key, value, cache, slot_mapping)
    rows, kv_heads, head_dim = key.shape
    num_heads = 0 if query is None else query.shape[1]
    if rows == 0:
        return
    config = _config(num_heads, kv_heads, head_dim, cache.block_size, cache.kv_format, key.dtype)
    block_h = config["BLOCK_H"]
    tiles = triton.cdiv(num_heads, block_h) + 2 * triton.cdiv(kv_heads, block_h)
    query = key if query is None else query
    _rotary_write_kernel[(rows, tiles)](
        query,
        key,
        value,
        key if out is None else out,
        key if cos is None else cos,
        key if sin is None else sin,
        slot_mapping,
        cache.k,
        cache.v,
        cache.k if cache.k_params is None else cache.k_params,
        cache.v if cache.v_params is None else cache.v_params,
        key if q_norm is None else q_norm,
        key if k_norm is None else k_norm,
        eps,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        **config,
        HAS_ROTARY=cos is not None,
        HAS_NORM=q_norm is not None,
        HAS_FP8=has_fp8_conversion(key.device),
        INTERPRET=is_interpreting(),
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )


def _check(key: Tensor, value: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    kv_format = cache.kv_format
    if key.dim() != 3 or key.shape[1] != cache.num_kv_heads or key.shape[2] % 2:
        raise ValueError(f"key must be [rows, {cache.num_kv_heads}, even], found {tuple(key.shape)}")
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("the values of a head must lie together")
    if kv_format.values_per_unit == 2 and key.shape[2] % 4:
        # Half a head would end within a byte.
        raise ValueError(f"a 4-bit cache needs head_dim to be a multiple of 4, found {key.shape[2]}")
    if slot_mapping.shape != key.shape[:1] or slot_mapping.stride(-1) != 1:
        raise ValueError(f"slot_mapping must be [{key.shape[0]}], found {tuple(slot_mapping.shape)}")
    for stored, params in ((cache.k, cache.k_params), (cache.v, cache.v_params)):
        if stored.shape[3] != kv_format.row_size(key.shape[2]) or not stored.is_contiguous():
            raise ValueError(
                f"a {kv_format.name} cache of {key.shape[2]} values a head must be contiguous, "
                f"found {tuple(stored.shape)}"
            )
        if kv_format.is_quantized and (
            params is None or params.shape != stored.shape[:3] or not params.is_contiguous()
        ):
            raise ValueError(f"a {kv_format.name} cache needs contiguous params {tuple(stored.shape[:3])}")


def _config(
    num_heads: int, kv_heads: int, head_dim: int, block_size: int, kv_format: KVFormat, dtype: torch.dtype
) -> dict[str, Any]:
    """The constants that model and cache decide."""
    half = head_dim // 2
    block_pairs = triton.next_power_of_2(half)
    block_h = min(max(1, _HALF_TILE // block_pairs), triton.next_power_of_2(max(num_heads, kv_heads)))
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "HALF": half,
        "FORMAT": kv_format.name if kv_format.is_quantized else "plain",
        "DTYPE": TRITON_DTYPES[dtype],
        "CACHE_DTYPE": TRITON_DTYPES[kv_format.storage],
        "BLOCK_H": block_h,
        "BLOCK_PAIRS": block_pairs,
    }


def compile_cases() -> list[CompileCase]:
    """A Llama 3 8B layer in every format, one with per-head norms, a head of 80, and the write alone."""
    return [
        *(_case(name, name, 32, 8, 128) for name in ("bfloat16", "fp8", "int8", "int4")),
        _case("fp8-in-integers", "fp8", 32, 8, 128, has_fp8=False),
        _case("int8/norms", "int8", 32, 8, 128, has_norm=True),
        _case("int8/head80", "int8", 32, 32, 80),
        _case("int8/head96", "int8", 32, 32, 96),
        _case("int8/head256", "int8", 8, 4, 256),
        _case("int8/head256/fp32 norms", "int8", 8, 4, 256, has_norm=True, norm="*fp32"),
        _case("int8/write", "int8", 0, 8, 128),
    ]


def _case(
    name: str,
    kv_format: str,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    has_norm: bool = False,
    norm: str = "*bf16",
    has_fp8: bool = True,
) -> CompileCase:
    stored = FORMATS[kv_format]
    element = "*u8" if stored.is_quantized else "*bf16"
    strides = {f"stride_{tensor}_{axis}": "i32" for tensor in "qkv" for axis in "nh"}
    is_write = num_heads == 0
    return CompileCase(
        name=f"rotary_write/{name}",
        kernel=_rotary_write_kernel,
        signature={
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*bf16" if is_write else "*fp32"),
            "slot_ptr": "*i64",
            **dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), element),
            **dict.fromkeys(("k_params_ptr", "v_params_ptr"), "*i32" if stored.is_quantized else element),
            **dict.fromkeys(("q_norm_ptr", "k_norm_ptr"), norm),
            "eps": "fp32",
            **strides,
        },
        constexprs={
            **_config(num_heads, kv_heads, head_dim, 128, stored, torch.bfloat16),
            "HAS_ROTARY": not is_write,
            "HAS_NORM": has_norm,
            "HAS_FP8": has_fp8,
            "INTERPRET": False,
        },
        num_warps=_NUM_WARPS,
        num_stages=3,
        has_fp_fusion=False,
        unaligned=frozenset({"eps", "slot_ptr"}),
        notes={"sm_80": "has no conversion to float8"} if kv_format == "fp8" and has_fp8 else {},
    )
