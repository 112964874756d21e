"""Launches of the decode kernel: its constants, its workspace, what arguments must be like.

Knows shapes only: no tensor is read and nothing is launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from services.engine.kernels.kv_format import FORMATS, LayerCache

SPLIT_SIZE = 512
"""Keys of a split. A constant: with another split a row has other bits."""
NUM_LANES = 4
PROGRAMS_PER_PROCESSOR = 32
"""Ten rounds of what is resident, roughly: more would be spent on empty programs under a loose bound, and
with fewer a long sequence among short ones would be left to few programs.
"""


def num_splits(max_context: int, split_size: int = SPLIT_SIZE, sliding_window: int | None = None) -> int:
    """Splits that a context of at most `max_context` tokens can touch."""
    splits = max(1, -(-max_context // split_size))
    if sliding_window is None:
        return splits
    # A window that begins at the last key of a split.
    return min(splits, (sliding_window + split_size - 2) // split_size + 1)


def num_programs(device: torch.device, num_heads: int, splits: int) -> int:
    """Programs that share up to `splits` splits of one of `num_heads` tiles of heads of all sequences."""
    if device.type != "cuda":
        # In the interpreter some programs take several splits, and some one.
        return min(splits, 2)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(splits, max(4, triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, num_heads)))


def workspace_size(num_sequences: int, num_heads: int, head_dim: int, splits: int) -> int:
    """fp32 elements that a launch with more than one split writes between its two kernels."""
    return num_sequences * num_heads * splits * (head_dim + 1)


def launch_constants(
    dtype: torch.dtype,
    cache: LayerCache,
    num_heads: int,
    head_dim: int,
    split_size: int,
    sliding_window: int | None,
    softcap: float | None = None,
) -> dict[str, Any]:
    """Constants of the launch: by the shapes of the model and the cache, never by the batch's."""
    kv_format = cache.kv_format
    block_d = max(64, triton.next_power_of_2(head_dim))
    group = num_heads // cache.num_kv_heads
    is_wide = dtype == torch.float32 or (not kv_format.is_quantized and dtype != kv_format.storage)
    block_h = 8 if group <= 8 else 16
    block_n, num_stages = _tile(kv_format.row_size(block_d) * kv_format.storage.itemsize, block_h, is_wide)
    return {
        "FORMAT": kv_format.name if kv_format.is_quantized else "float",
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_SIZE": cache.block_size,
        "BLOCK_H": block_h,
        "BLOCK_N": block_n,
        "LANES": NUM_LANES,
        "SPLIT": split_size,
        "WINDOW": sliding_window or 0,
        "SOFTCAP": float(softcap or 0.0),
        "IS_WIDE": is_wide,
        "NUM_STAGES": num_stages,
    }


def _tile(row_bytes: int, block_h: int, is_wide: bool) -> tuple[int, int]:
    """(keys of a tile, stages of the pipeline) for K and V vectors of so many bytes each.

    Tiles of 16 to 32 KB, one or two of them on their way while one is worked on. Sixteen heads need twice the
    registers for scores.
    """
    if is_wide or row_bytes > 256:
        return 64, 2
    if row_bytes > 128 or block_h > 8:
        return 64, 3
    return 128, 3 if row_bytes <= 64 else 2


def max_registers(constants: dict[str, Any]) -> int | None:
    """Bound on a thread's registers: room for three programs on a multiprocessor, where nothing spills."""
    has_one_block = constants["BLOCK_SIZE"] >= constants["BLOCK_N"]
    is_small = constants["BLOCK_H"] == 8 and constants["BLOCK_D"] <= 128
    return 168 if has_one_block and is_small and not constants["IS_WIDE"] else None


def as_operands(cache: LayerCache, is_wide: bool) -> tuple[Tensor, Tensor]:
    """K and V as the kernel reads them: words of codes; V of 16 bits in words of two values."""
    if cache.kv_format.is_quantized:
        return cache.k.view(torch.int32), cache.v.view(torch.int32)
    return cache.k, cache.v if is_wide else cache.v.view(torch.int32)


def check_arguments(
    query: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    context_lens: Tensor,
    split_size: int,
    sliding_window: int | None,
    softcap: float | None = None,
) -> None:
    """Raises ValueError for tensors that the kernel would misread."""
    num_seqs, num_heads, head_dim = query.shape
    blocks, kv_heads, block_size, row_size = cache.k.shape
    if cache.v.shape != cache.k.shape or not (cache.k.is_contiguous() and cache.v.is_contiguous()):
        raise ValueError(f"K and V must be dense and alike: {tuple(cache.k.shape)}, {tuple(cache.v.shape)}")
    if row_size != cache.kv_format.row_size(head_dim) or head_dim % 8 or head_dim > 256:
        raise ValueError(f"head_dim {head_dim}, rows of {row_size} in a cache of {cache.kv_format.name}")
    if num_heads % kv_heads or query.stride(2) != 1:
        raise ValueError(f"query {tuple(query.shape)}, strides {query.stride()}, for {kv_heads} kv heads")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size} is no power of two from 16 on")
    if split_size < 128 or split_size & (split_size - 1):
        raise ValueError(f"split_size {split_size} is no power of two from 128 on")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap}")
    for params in (cache.k_params, cache.v_params) if cache.kv_format.is_quantized else ():
        if params is None or params.shape != (blocks, kv_heads, block_size) or not params.is_contiguous():
            raise ValueError(
                f"a cache of {cache.kv_format.name} needs dense params {(blocks, kv_heads, block_size)}"
            )
    for name, tensor in (("block_tables", block_tables), ("context_lens", context_lens)):
        # Even a row without a key has the first entry of its table read.
        is_empty = num_seqs > 0 and tensor.numel() == 0
        if tensor.dtype != torch.int32 or tensor.shape[0] != num_seqs or tensor.stride(-1) != 1 or is_empty:
            raise ValueError(
                f"{name} must be int32 for {num_seqs} sequences: {tensor.dtype} {tuple(tensor.shape)}"
            )


@dataclass(frozen=True, slots=True)
class SampleLaunch:
    """A launch as the compile lane sees it. `gate`: instructions per element of the main loop, if any."""

    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    gate: float | None


_GATES = {"bfloat16": 2.5, "float16": 2.5, "fp8": 2.5, "int8": 2.5, "int4": 2.5}


def sample_launches() -> list[SampleLaunch]:
    """Launches of models that are served; those of 128 values a head in groups of 4 and 8 have gates."""
    names = ("bfloat16", "fp8", "int8", "int4")
    return [
        *(_sample(name, group, 128) for name in names for group in (4, 8)),
        _sample("bfloat16", 16, 128),
        _sample("int8", 16, 128),
        _sample("bfloat16", 4, 128, block_size=16),
        _sample("int8", 4, 128, block_size=16),
        _sample("int8", 8, 128, window=4096),
        _sample("int4", 1, 64),
        _sample("bfloat16", 1, 96),
        _sample("int8", 1, 96),
        _sample("fp8", 3, 80),
        _sample("bfloat16", 8, 256, window=4096),
        _sample("int8", 8, 256),
        *(_sample(name, 2, 256, softcap=50.0) for name in ("bfloat16", "fp8", "int8", "int4")),
        _sample("bfloat16", 2, 256, window=4096, softcap=50.0),
        _sample("bfloat16", 2, 128, softcap=50.0),
        _sample("fp8", 4, 128, use_cvt=False),
        _sample("float16", 4, 128),
        _sample("float32", 4, 128),
    ]


def _sample(
    format_name: str,
    group: int,
    head_dim: int,
    *,
    block_size: int = 128,
    window: int | None = None,
    softcap: float | None = None,
    use_cvt: bool = True,
) -> SampleLaunch:
    kv_format = FORMATS[format_name]
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(format_name, torch.bfloat16)
    k = torch.empty((1, 1, block_size, kv_format.row_size(head_dim)), dtype=kv_format.storage, device="meta")
    cache = LayerCache(kv_format, k, k)
    constants = launch_constants(dtype, cache, group, head_dim, SPLIT_SIZE, window, softcap)
    use_cvt = use_cvt and format_name == "fp8"
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    words = "*i32" if kv_format.is_quantized else pointer
    is_gated = (
        softcap is None
        and head_dim == 128
        and group <= 8
        and block_size == 128
        and use_cvt == (format_name == "fp8")
    )
    name = f"paged_decode/{format_name}/group{group}/head_dim{head_dim}/block{block_size}"
    name += "" if window is None else f"/window{window}"
    name += "" if softcap is None else "/softcap"
    return SampleLaunch(
        name=name if use_cvt or format_name != "fp8" else f"{name}/integers",
        signature={
            "out_ptr": "*fp32",
            "lse_ptr": "*fp32",
            "query_ptr": pointer,
            "k_ptr": words,
            "v_ptr": words if constants["IS_WIDE"] else "*i32",
            "k_params_ptr": "*i32",
            "v_params_ptr": "*i32",
            "block_tables_ptr": "*i32",
            "context_lens_ptr": "*i32",
            "scale_log2": "fp32",
            "num_splits": "i32",
            "num_kv_heads": "i32",
            "stride_query_s": "i32",
            "stride_query_h": "i32",
            "stride_table": "i32",
        },
        constants=constants | {"IS_SINGLE": False, "USE_CVT": use_cvt, "INTERPRET": False},
        gate=_GATES.get(format_name) if is_gated else None,
    )
