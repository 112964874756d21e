"""Causal attention of a ragged batch over the blocked cache: prefill chunks and decodes in one launch.

The launcher of `paged_prefill_kernel`. Knows rows, blocks and formats of the cache; not who owns a block, nor
how the rows came to be.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.paged_prefill_config import (
    SHARED_MEMORY,
    PrefillConfig,
    choose_config,
)
from services.engine.kernels.gpu.paged_prefill_kernel import paged_prefill_kernel
from services.engine.kernels.gpu.rounding import has_fp8_conversion, is_interpreting
from services.engine.kernels.kv_format import FORMATS, KVFormat, LayerCache

_INDEX_SPAN = 128
"""Sequences that one step of the search looks at."""


def paged_prefill(
    query: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    max_query_len: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    out: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Causal attention of rows over their sequences' cached keys; [rows, heads, head_dim], the query's dtype.

    Args:
        query: [rows, heads, head_dim]; the rows of sequence i lie from query_starts[i] on, and are the last
            positions of its context. A decode is a sequence of one row.
        cache: one layer's K and V, in which the rows' own keys have been written.
        block_tables: int32 [num_seqs, max_blocks]; entries past a sequence's last block are not read.
        query_starts: int32 [num_seqs + 1]. Rows from query_starts[num_seqs] on belong to no sequence.
        context_lens: int32 [num_seqs], tokens in the cache; 0 for a sequence that is padding.
        scale: what q.k is multiplied by, greater than 0.
        max_query_len: the most rows of any sequence, or a bound on it: it chooses the launch configuration.
        sliding_window: keys a row sees, its own included; None for all.
        softcap: a score becomes softcap * tanh(score / softcap).
        deterministic: one launch configuration for all batches, so that a row's bits are the same in each.
        out: where to write, like query.
        config: instead of the configuration chosen.

    Rows with no key get zeros, and so do rows that belong to no sequence. Raises ValueError for tensors that
    do not fit together.
    """
    _check(query, cache, scale, sliding_window, softcap)
    _check_batch(block_tables, query_starts, context_lens)
    rows, num_heads, head_dim = query.shape
    group = num_heads // cache.num_kv_heads
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if out.shape != query.shape or out.stride(2) != 1:
        raise ValueError(f"out must be like query {tuple(query.shape)}, found {tuple(out.shape)}")
    if rows == 0:
        return out
    if config is None:
        config = choose_config(
            query.dtype,
            head_dim,
            group,
            None if deterministic else max_query_len,
            cache.block_size,
            shared_memory=_shared_memory(query.device),
        )
    if config.block_m < group:
        raise ValueError(f"{group} query heads to a kv head do not fit into a tile of {config.block_m}")
    k, v, k_params, v_params = _operands(cache)
    num_seqs = context_lens.shape[0]
    grid = (rows // (config.block_m // group) + num_seqs + 1, cache.num_kv_heads)
    paged_prefill_kernel[grid](
        out,
        query,
        k,
        v,
        k_params,
        v_params,
        block_tables,
        query_starts,
        context_lens,
        num_seqs,
        rows,
        scale * math.log2(math.e),
        *out.stride()[:2],
        *query.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *k_params.stride()[:2],
        *v_params.stride()[:2],
        block_tables.stride(0),
        **_constants(cache.kv_format, cache.block_size, config, group, head_dim, sliding_window, softcap),
        USE_CVT=cache.kv_format.name == "fp8" and has_fp8_conversion(query.device),
        INTERPRET=is_interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes for one program; in the interpreter those of sm_90."""
    if is_interpreting():
        return SHARED_MEMORY[90]
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def _operands(cache: LayerCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, V and their scales as the kernel reads them: codes as int32 words."""
    if cache.k_params is None or cache.v_params is None:
        return cache.k, cache.v, cache.k, cache.v
    return cache.k.view(torch.int32), cache.v.view(torch.int32), cache.k_params, cache.v_params


def _codes_per_word(kv_format: KVFormat) -> int:
    """Values in what the kernel loads at a time; 1 for full precision."""
    return 4 * kv_format.values_per_unit if kv_format.is_quantized else 1


def _constants(
    kv_format: KVFormat,
    block_size: int,
    config: PrefillConfig,
    group: int,
    head_dim: int,
    sliding_window: int | None,
    softcap: float | None,
) -> dict[str, int | float | str]:
    """Constexpr arguments that do not depend on the device."""
    per_unit = _codes_per_word(kv_format)
    block_d = max(16, triton.next_power_of_2(head_dim))
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "ROW_SIZE": head_dim // per_unit,
        "BLOCK_ROW": block_d // per_unit,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": config.block_m,
        "TILE": config.tile,
        "WINDOW": sliding_window or 0,
        "SOFTCAP": float(softcap or 0.0),
        "SPAN": _INDEX_SPAN,
        "NUM_STAGES": config.num_stages,
        "FORMAT": kv_format.name if kv_format.is_quantized else "float",
    }


def _check(
    query: Tensor, cache: LayerCache, scale: float, sliding_window: int | None, softcap: float | None
) -> None:
    if query.dim() != 3 or query.stride(2) != 1 or query.shape[2] % 8:
        raise ValueError(
            f"query must be [rows, heads, head_dim] with head_dim in eights, {tuple(query.shape)}"
        )
    if query.shape[1] % cache.num_kv_heads:
        raise ValueError(f"{query.shape[1]} query heads over {cache.num_kv_heads} kv heads")
    per_word = _codes_per_word(cache.kv_format)
    if query.shape[2] % per_word:
        raise ValueError(f"{cache.kv_format.name} wants head_dim in {per_word}s, found {query.shape[2]}")
    row_size = cache.kv_format.row_size(query.shape[2])
    for name, tensor in (("k", cache.k), ("v", cache.v)):
        if tensor.shape[3] != row_size:
            raise ValueError(f"{name} {tuple(tensor.shape)} holds no vectors of {query.shape[2]}")
        if tensor.stride()[2:] != (row_size, 1):
            raise ValueError(f"one head's vectors in a block must lie together, {name} has {tensor.stride()}")
    if cache.k.element_size() > query.element_size():
        raise ValueError(f"a {cache.k.dtype} cache under {query.dtype} rows would not fit into shared memory")
    if cache.block_size < 16 or cache.block_size & (cache.block_size - 1):
        raise ValueError(f"block size must be a power of two from 16 on, found {cache.block_size}")
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, found {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"a window holds at least the row itself, found {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be greater than 0, found {softcap}")


def _check_batch(block_tables: Tensor, query_starts: Tensor, context_lens: Tensor) -> None:
    num_seqs = context_lens.shape[0]
    if query_starts.shape != (num_seqs + 1,) or block_tables.shape[0] != num_seqs or num_seqs == 0:
        shapes = tuple(block_tables.shape), tuple(query_starts.shape), tuple(context_lens.shape)
        raise ValueError(f"tables, starts and lengths must be of the same sequences, found {shapes}")
    for tensor in (block_tables, query_starts, context_lens):
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"tables, starts and lengths must be int32 without gaps, found {tensor.dtype}")


_MAX_INSTRUCTIONS = {"bfloat16": 6.0, "int8": 10.5, "int4": 9.8, "fp8": 9.5}
"""For 128 query vectors of 128; what masks a tile at the edge is counted although most tiles pass it by."""


def compile_cases() -> list[CompileCase]:
    """Chunks and narrow batches of every format, by head_dim; then what else changes the machine code."""
    cases = [
        _case(head_dim, kv_name, rows)
        for head_dim in (64, 128, 256)
        for kv_name in ("bfloat16", "int8", "int4", "fp8")
        for rows in (1024, 4)
    ]
    cases += [
        _case(128, "bfloat16", 1024, block_size=16),
        _case(128, "int8", 1024, block_size=16),
        _case(128, "bfloat16", 1024, window=4096),
        _case(96, "bfloat16", 1024),
        _case(80, "int8", 1024),
        _case(128, "float32", 1024),
        _case(128, "bfloat16", 1024, softcap=50.0),
        *(_case(256, name, rows, softcap=50.0) for name in ("bfloat16", "int8") for rows in (1024, 4)),
        _case(256, "bfloat16", 1024, window=4096, softcap=50.0),
    ]
    cases += [
        _case(head_dim, kv_name, 1024, arch=80)
        for head_dim in (128, 256)
        for kv_name in ("bfloat16", "int8", "fp8")
    ]
    cases += [_case(head_dim, "fp8", 4, arch=80) for head_dim in (128, 256)]
    return cases + [_case(head_dim, "bfloat16", 1024, arch=86) for head_dim in (128, 256)]


def _case(
    head_dim: int,
    kv_name: str,
    rows: int,
    *,
    block_size: int = 128,
    window: int | None = None,
    softcap: float | None = None,
    arch: int = 90,
) -> CompileCase:
    """Four query heads to a kv head, bfloat16 rows (fp32 over an fp32 cache)."""
    group = 4
    kv_format = FORMATS[kv_name]
    dtype, query = (torch.float32, "*fp32") if kv_name == "float32" else (torch.bfloat16, "*bf16")
    config = choose_config(dtype, head_dim, group, rows, block_size, shared_memory=SHARED_MEMORY[arch])
    stored = "*i32" if kv_format.is_quantized else query
    pointers = dict.fromkeys(("out_ptr", "query_ptr"), query)
    pointers |= dict.fromkeys(("k_ptr", "v_ptr", "k_params_ptr", "v_params_ptr"), stored)
    pointers |= dict.fromkeys(("block_tables_ptr", "query_starts_ptr", "context_lens_ptr"), "*i32")
    constants = _constants(kv_format, block_size, config, group, head_dim, window, softcap)
    constants |= {"USE_CVT": kv_name == "fp8" and arch >= 89, "INTERPRET": False}
    numbers = [
        name for name in paged_prefill_kernel.arg_names if name not in pointers and name not in constants
    ]
    name = f"paged_prefill/{kv_name}/head{head_dim}/m{config.block_m}"
    name += f"/block{block_size}" * (block_size != 128) + f"/window{window}" * (window is not None)
    name += "/softcap" * (softcap is not None)
    if arch == 90:
        notes = {"sm_80": "launched otherwise"} if config.block_m == 128 or kv_name == "fp8" else {}
    else:
        name += f"/sm{arch}"
        notes = {"sm_90": "launched otherwise", "sm_100": "launched otherwise"}
    return CompileCase(
        name=name,
        kernel=paged_prefill_kernel,
        signature=pointers | {name: "fp32" if name == "scale_log2" else "i32" for name in numbers},
        constexprs=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        unaligned=frozenset({"num_seqs", "num_rows", "stride_table", "scale_log2", "context_lens_ptr"}),
        elements_per_iteration=2 * config.tile * head_dim,
        max_instructions=_MAX_INSTRUCTIONS.get(kv_name) if name.endswith("head128/m128") else None,
        has_tensor_cores=kv_name != "float32",
        notes=notes,
    )
