"""Causal attention of a ragged batch over the blocked cache: prefill chunks and decodes in one launch.

Knows rows, blocks and formats of the cache; not who owns a block, nor how the rows came to be.

One program holds one kv head and BLOCK_M query vectors of one sequence: BLOCK_M // GROUP neighbouring rows,
each with all the query heads that share the kv head, so that K and V are read once for all of them. It walks
over the keys in tiles that begin at absolute multiples of TILE, in order, with a running softmax in fp32
(arXiv 2205.14135). A tile that a row does not see leaves the row's sums as they were, to the bit: so for one
launch configuration a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.paged_prefill_config import PrefillConfig, choose_config
from services.engine.kernels.gpu.paged_prefill_tiles import load_tile
from services.engine.kernels.gpu.rounding import has_fp8_conversion, is_interpreting
from services.engine.kernels.kv_format import FORMATS, KVFormat, LayerCache

_INDEX_SPAN = 128
"""Sequences that one step of the search looks at."""


@triton.jit
def _sequence_of_tile(query_starts_ptr, num_seqs, tile, BLOCK_Q: tl.constexpr, SPAN: tl.constexpr):
    """Which sequence a query tile belongs to: num_seqs for the rows after the last sequence.

    Sequence i begins at tile query_starts[i] // BLOCK_Q + i. That leaves every sequence tiles enough, needs
    no table from the host, and bounds the number of tiles by rows // BLOCK_Q + num_seqs + 1.
    """
    count = 0
    for first in range(0, num_seqs + 1, SPAN):
        index = first + tl.arange(0, SPAN)
        start = tl.load(query_starts_ptr + index, mask=index <= num_seqs, other=0)
        is_before = (index <= num_seqs) & (start // BLOCK_Q + index <= tile)
        count += tl.sum(is_before.to(tl.int32), 0)
    return count - 1


@triton.jit
def _block_of(table_ptr, start, key_end, BLOCK_SIZE: tl.constexpr):
    """Physical block of key `start`, 0 past the last key."""
    return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < key_end, other=0)


@triton.jit
def _softmax_step(scores, maximum, total, scale_log2):
    """Running softmax over one more tile: (weights, factor of what was summed before, maximum, total).

    Products and sums are fused by hand: which of them a compiler fuses may differ between two kernels.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no key yet: any finite base keeps its weights at zero.
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * scale_log2
    weights = tl.exp2(tl.fma(scores, scale_log2, -base[:, None]))
    decay = tl.exp2(tl.fma(maximum, scale_log2, -base))
    return weights, decay, new_maximum, tl.fma(total, decay, tl.sum(weights, 1))


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "stride_table"])
def _paged_prefill_kernel(
    out_ptr,
    query_ptr,
    k_ptr,
    v_ptr,
    k_params_ptr,
    v_params_ptr,
    block_tables_ptr,
    query_starts_ptr,
    context_lens_ptr,
    num_seqs,
    num_rows,
    scale_log2,
    stride_out_n,
    stride_out_h,
    stride_query_n,
    stride_query_h,
    stride_k_block,
    stride_k_head,
    stride_v_block,
    stride_v_head,
    stride_k_params_block,
    stride_k_params_head,
    stride_v_params_block,
    stride_v_params_head,
    stride_table,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    FORMAT: tl.constexpr,
    USE_CVT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # Programs that run together share a kv head, so that its K and V are found in the L2. The last rows of a
    # sequence see the most keys: they start first, so that no long program is left alone at the end.
    kv_head = tl.program_id(1).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = _sequence_of_tile(query_starts_ptr, num_seqs, tile, BLOCK_Q, SPAN)
    is_real = sequence < num_seqs
    row_begin = tl.load(query_starts_ptr + sequence)
    row_end = tl.load(query_starts_ptr + sequence + 1, mask=is_real, other=num_rows)
    context = tl.load(context_lens_ptr + sequence, mask=is_real, other=0)
    first_row = row_begin + (tile - sequence - row_begin // BLOCK_Q) * BLOCK_Q
    if first_row >= row_end:
        return

    member = tl.arange(0, BLOCK_M)
    row = first_row + member // GROUP
    head = kv_head * GROUP + member % GROUP
    columns = tl.arange(0, BLOCK_D)
    is_member = (member // GROUP < BLOCK_Q) & (row < row_end)
    is_output = is_member[:, None] & (columns < HEAD_DIM)[None, :]
    query_rows = query_ptr + row.to(tl.int64) * stride_query_n + head * stride_query_h
    query = tl.load(query_rows[:, None] + columns[None, :], mask=is_output, other=0.0)
    if INTERPRET:
        query = query.to(tl.float32)

    position = row + (context - row_end)
    first_position = first_row + (context - row_end)
    key_end = tl.minimum(first_position + BLOCK_Q, context)
    key_begin = 0
    if WINDOW > 0:
        key_begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * stride_table
    k_head_ptr = k_ptr + kv_head * stride_k_head
    v_head_ptr = v_ptr + kv_head * stride_v_head
    k_params_head_ptr = k_params_ptr + kv_head * stride_k_params_head
    v_params_head_ptr = v_params_ptr + kv_head * stride_v_params_head
    units = tl.arange(0, BLOCK_ROW)
    lane = tl.arange(0, TILE)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Where a tile lies in one block, the block's number is read one tile ahead. Read when it is wanted, it
    # would take a stage of the pipeline for itself.
    next_block = _block_of(table_ptr, key_begin, key_end, BLOCK_SIZE)
    for start in tl.range(key_begin, key_end, TILE, num_stages=NUM_STAGES):
        key = start + lane
        is_key = key < key_end
        if BLOCK_SIZE >= TILE:
            block = next_block.to(tl.int64)
            next_block = _block_of(table_ptr, start + TILE, key_end, BLOCK_SIZE)
            slot = start % BLOCK_SIZE + lane
        else:
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            slot = lane % BLOCK_SIZE
        mask = is_key[:, None] & (units < ROW_SIZE)[None, :]
        k = load_tile(
            k_head_ptr,
            k_params_head_ptr,
            block * stride_k_block + slot * ROW_SIZE,
            block * stride_k_params_block + slot,
            units,
            mask,
            is_key,
            DTYPE,
            FORMAT,
            USE_CVT,
            INTERPRET,
        )
        v = load_tile(
            v_head_ptr,
            v_params_head_ptr,
            block * stride_v_block + slot * ROW_SIZE,
            block * stride_v_params_block + slot,
            units,
            mask,
            is_key,
            DTYPE,
            FORMAT,
            USE_CVT,
            INTERPRET,
        )
        scores = tl.dot(query, k.T, input_precision="ieee")
        # One loop with a branch that the whole program takes, not two loops: a row meets the same machine
        # code whether its tile is masked for a neighbour's sake or not, and loads stay in flight throughout.
        is_edge = start + TILE > first_position + 1
        if WINDOW > 0:
            is_edge = is_edge | (start <= key_end - 1 - WINDOW)
        if is_edge:
            is_seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(is_seen, scores, float("-inf"))
        weights, decay, maximum, total = _softmax_step(scores, maximum, total, scale_log2)
        weights = weights.to(DTYPE)
        if INTERPRET:
            weights = weights.to(tl.float32)
        acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_rows = out_ptr + row.to(tl.int64) * stride_out_n + head * stride_out_h
    tl.store(out_rows[:, None] + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_output)


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
        deterministic: one launch configuration for all batches, so that a row's bits are the same in each.
        out: where to write, like query.
        config: instead of the configuration chosen.

    Rows with no key get zeros, and so do rows that belong to no sequence. Raises ValueError for tensors that
    do not fit together.
    """
    _check(query, cache, scale, sliding_window)
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
            is_sm90=is_interpreting() or torch.cuda.get_device_capability(query.device) >= (9, 0),
        )
    if config.block_m < group:
        raise ValueError(f"{group} query heads to a kv head do not fit into a tile of {config.block_m}")
    k, v, k_params, v_params = _operands(cache)
    num_seqs = context_lens.shape[0]
    grid = (rows // (config.block_m // group) + num_seqs + 1, cache.num_kv_heads)
    _paged_prefill_kernel[grid](
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
        **_constants(cache.kv_format, cache.block_size, config, group, head_dim, sliding_window),
        USE_CVT=cache.kv_format.name == "fp8" and has_fp8_conversion(query.device),
        INTERPRET=is_interpreting(),
        num_warps=config.num_warps,
    )
    return out


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
) -> dict[str, int | str]:
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
        "SPAN": _INDEX_SPAN,
        "NUM_STAGES": config.num_stages,
        "FORMAT": kv_format.name if kv_format.is_quantized else "float",
    }


def _check(query: Tensor, cache: LayerCache, scale: float, sliding_window: int | None) -> None:
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
    ]
    return cases + [
        _case(head_dim, kv_name, 1024, is_sm90=False)
        for head_dim in (128, 256)
        for kv_name in ("bfloat16", "int8", "fp8")
    ]


def _case(
    head_dim: int,
    kv_name: str,
    rows: int,
    *,
    block_size: int = 128,
    window: int | None = None,
    is_sm90: bool = True,
) -> CompileCase:
    """Four query heads to a kv head, bfloat16 rows (fp32 over an fp32 cache)."""
    group = 4
    kv_format = FORMATS[kv_name]
    dtype, query = (torch.float32, "*fp32") if kv_name == "float32" else (torch.bfloat16, "*bf16")
    config = choose_config(dtype, head_dim, group, rows, block_size, is_sm90=is_sm90)
    stored = "*i32" if kv_format.is_quantized else query
    pointers = dict.fromkeys(("out_ptr", "query_ptr"), query)
    pointers |= dict.fromkeys(("k_ptr", "v_ptr", "k_params_ptr", "v_params_ptr"), stored)
    pointers |= dict.fromkeys(("block_tables_ptr", "query_starts_ptr", "context_lens_ptr"), "*i32")
    constants = _constants(kv_format, block_size, config, group, head_dim, window)
    constants |= {"USE_CVT": kv_name == "fp8" and is_sm90, "INTERPRET": False}
    numbers = [
        name for name in _paged_prefill_kernel.arg_names if name not in pointers and name not in constants
    ]
    name = f"paged_prefill/{kv_name}/head{head_dim}/m{config.block_m}"
    name += f"/block{block_size}" * (block_size != 128) + f"/window{window}" * (window is not None)
    if is_sm90:
        notes = {"sm_80": "launched otherwise"} if config.block_m == 128 or kv_name == "fp8" else {}
    else:
        name += "/sm80"
        notes = {"sm_90": "launched otherwise", "sm_100": "launched otherwise"}
    return CompileCase(
        name=name,
        kernel=_paged_prefill_kernel,
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
