"""Between the fused projection and attention, in one launch: per-head norms, rotary, the write of K and V.

What is stored is that of `reference.rotary_write_kv` to the bit where no norm comes before: the rotation is
rounded to the dtype of the activations and quantised from there, multiplications and additions stay unfused.
The launcher of `rotary_write_kernel`. Knows slots; not sequences, nor who owns a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.rotary_write_kernel import rotary_write_kernel
from services.engine.kernels.gpu.rounding import TRITON_DTYPES, has_fp8_conversion, is_interpreting
from services.engine.kernels.kv_format import FORMATS, KVFormat, LayerCache

_HALF_TILE = 512
"""Pairs of values in one program's tile: eight to a thread, so that a half of a bfloat16 head is one 16-byte
load.
"""
_NUM_WARPS = 2


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
    rotary_write_kernel[(rows, tiles)](
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
        kernel=rotary_write_kernel,
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
