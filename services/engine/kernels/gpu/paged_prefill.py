"""Causal attention of a ragged batch over the blocked cache: prefill chunks and decodes in one launch.

Knows rows, blocks and formats of the cache; not who owns a block, nor how the rows came to be.

One program holds one kv head and BLOCK_M query vectors of one sequence: BLOCK_M // GROUP neighbouring rows, each
with all the query heads that share the kv head, so that K and V are read once for all of them. It walks over
the keys in tiles that begin at absolute multiples of TILE, in order, with a running softmax in fp32 (arXiv
2205.14135). A tile that a row does not see leaves the row's sums as they were, to the bit: so for one launch
configuration a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.paged_prefill_config import PrefillConfig, choose_config
from services.engine.kernels.gpu.rounding import is_interpreting
from services.engine.kernels.kv_format import LayerCache


@triton.jit
def _sequence_of_tile(query_starts_ptr, num_seqs, tile, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """Which sequence a query tile belongs to: num_seqs for the rows after the last sequence.

    Sequence i begins at tile query_starts[i] // BLOCK_Q + i. That leaves every sequence tiles enough,
    needs no table from the host, and bounds the number of tiles by rows // BLOCK_Q + num_seqs + 1.
    """
    count = 0
    for first in range(0, num_seqs + 1, BLOCK_S):
        index = first + tl.arange(0, BLOCK_S)
        start = tl.load(query_starts_ptr + index, mask=index <= num_seqs, other=0)
        is_before = (index <= num_seqs) & (start // BLOCK_Q + index <= tile)
        count += tl.sum(is_before.to(tl.int32), 0)
    return count - 1


@triton.jit
def _load_tile(base_ptr, slots, columns, mask, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """[TILE, BLOCK_D] of K or V, zero where the mask is not set, ready to be multiplied."""
    tile = tl.load(base_ptr + slots[:, None] + columns[None, :], mask=mask, other=0.0)
    if INTERPRET:
        return tile.to(tl.float32)
    else:
        return tile.to(DTYPE)


@triton.jit
def _paged_prefill_kernel(
    out_ptr,
    query_ptr,
    k_ptr,
    v_ptr,
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
    stride_table,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    # The last rows of a sequence see the most keys: they start first, so that no long program is left alone.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = _sequence_of_tile(query_starts_ptr, num_seqs, tile, BLOCK_Q, 128)
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
    is_column = columns < HEAD_DIM
    is_member = ((member // GROUP < BLOCK_Q) & (row < row_end))[:, None] & is_column[None, :]
    query_rows = query_ptr + row.to(tl.int64) * stride_query_n + head * stride_query_h
    query = tl.load(query_rows[:, None] + columns[None, :], mask=is_member, other=0.0)
    if INTERPRET:
        query = query.to(tl.float32)

    offset = context - row_end
    position = row + offset
    first_position = first_row + offset
    last_position = tl.minimum(first_position + BLOCK_Q, context) - 1
    key_begin = 0
    if WINDOW > 0:
        key_begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
    key_end = last_position + 1

    table_ptr = block_tables_ptr + sequence.to(tl.int64) * stride_table
    k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_k_head
    v_head_ptr = v_ptr + kv_head.to(tl.int64) * stride_v_head
    lane = tl.arange(0, TILE)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(key_begin, key_end, TILE, num_stages=NUM_STAGES):
        key = start + lane
        is_key = key < key_end
        if BLOCK_SIZE >= TILE:
            # The tile lies in one block.
            block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
            inside = (start % BLOCK_SIZE + lane) * ROW_SIZE
        else:
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            inside = (key % BLOCK_SIZE) * ROW_SIZE
        mask = is_key[:, None] & is_column[None, :]
        k = _load_tile(k_head_ptr, block * stride_k_block + inside, columns, mask, DTYPE, INTERPRET)
        v = _load_tile(v_head_ptr, block * stride_v_block + inside, columns, mask, DTYPE, INTERPRET)
        scores = tl.dot(query, k.T, input_precision="ieee")
        is_edge = start + TILE > first_position + 1
        if WINDOW > 0:
            is_edge = is_edge | (start <= last_position - WINDOW)
        # One loop with a branch that a whole program takes, not two loops: every row meets the same machine
        # code whether its tile is masked for a neighbour's sake or not, and loads stay in flight throughout.
        if is_edge:
            is_seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(is_seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen no key yet: any finite base keeps its weights at zero.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * scale_log2
        weights = tl.exp2(tl.fma(scores, scale_log2, -base[:, None]))
        decay = tl.exp2(tl.fma(maximum, scale_log2, -base))
        total = tl.fma(total, decay, tl.sum(weights, 1))
        weights = weights.to(DTYPE)
        if INTERPRET:
            weights = weights.to(tl.float32)
        acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
        maximum = new_maximum

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_rows = out_ptr + row.to(tl.int64) * stride_out_n + head * stride_out_h
    tl.store(out_rows[:, None] + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_member)


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
    _check(query, cache, block_tables, query_starts, context_lens, scale, sliding_window)
    rows, num_heads, head_dim = query.shape
    num_kv_heads = cache.num_kv_heads
    group = num_heads // num_kv_heads
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if rows == 0:
        return out
    if config is None:
        config = choose_config(query.dtype, head_dim, group, None if deterministic else max_query_len)
    num_seqs = context_lens.shape[0]
    grid = (num_kv_heads, rows // (config.block_m // group) + num_seqs + 1)
    _paged_prefill_kernel[grid](
        out,
        query,
        cache.k,
        cache.v,
        block_tables,
        query_starts,
        context_lens,
        num_seqs,
        rows,
        scale * math.log2(math.e),
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        cache.k.stride(0),
        cache.k.stride(1),
        cache.v.stride(0),
        cache.v.stride(1),
        block_tables.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        ROW_SIZE=cache.k.shape[3],
        BLOCK_SIZE=cache.block_size,
        BLOCK_M=config.block_m,
        TILE=config.tile,
        WINDOW=sliding_window or 0,
        NUM_STAGES=config.num_stages,
        INTERPRET=is_interpreting(),
        num_warps=config.num_warps,
    )
    return out


def _check(
    query: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
) -> None:
    if query.dim() != 3 or query.stride(2) != 1:
        raise ValueError(f"query must be [rows, heads, head_dim], found {tuple(query.shape)}")
    head_dim = query.shape[2]
    if query.shape[1] % cache.num_kv_heads:
        raise ValueError(f"{query.shape[1]} query heads over {cache.num_kv_heads} kv heads")
    for name, tensor in (("k", cache.k), ("v", cache.v)):
        if tensor.shape[3] != cache.kv_format.row_size(head_dim):
            raise ValueError(f"{name} {tuple(tensor.shape)} holds no vectors of {head_dim}")
        if tensor.stride(3) != 1 or tensor.stride(2) != tensor.shape[3]:
            raise ValueError(
                f"the vectors of one head's block must lie together, {name} has {tensor.stride()}"
            )
    if cache.block_size < 16 or cache.block_size & (cache.block_size - 1):
        raise ValueError(f"block size must be a power of two from 16 on, found {cache.block_size}")
    num_seqs = context_lens.shape[0]
    if query_starts.shape != (num_seqs + 1,) or block_tables.shape[0] != num_seqs or num_seqs == 0:
        shapes = tuple(block_tables.shape), tuple(query_starts.shape), tuple(context_lens.shape)
        raise ValueError(f"tables, starts and lengths must be of the same sequences, found {shapes}")
    for tensor in (block_tables, query_starts, context_lens):
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"tables, starts and lengths must be int32 without gaps, found {tensor.dtype}")
    if not scale > 0:
        raise ValueError(f"scale must be greater than 0, found {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"a window holds at least the row itself, found {sliding_window}")
