"""The kernel of `paged_prefill`. Device functions only: knows pointers, strides and tile sizes.

One program holds one kv head and BLOCK_M query vectors of one sequence: BLOCK_M // GROUP neighbouring rows,
each with all the query heads that share the kv head, so that K and V are read once for all of them. It walks
over the keys in tiles that begin at absolute multiples of TILE, in order, with a running softmax in fp32
(arXiv 2205.14135). A tile that a row does not see leaves the row's sums as they were, to the bit: so for one
launch configuration a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.paged_prefill_tiles import load_tile
from services.engine.kernels.gpu.softcap import capped


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

    The maximum is that of scores times scale_log2, rounded: a difference of two such maxima is exactly zero
    where they are equal, and the factor exactly one. A product fused with that difference would leave the
    product's rounding behind, and a tile that a row does not see would change its sums.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    # A row that has seen no key yet: any finite base keeps its weights at zero.
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(tl.fma(scores, scale_log2, -base[:, None]))
    decay = tl.exp2(maximum - base)
    return weights, decay, new_maximum, tl.fma(total, decay, tl.sum(weights, 1))


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "stride_table"])
def paged_prefill_kernel(
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
    SOFTCAP: tl.constexpr,
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
        score_unit = scale_log2
        if SOFTCAP > 0.0:
            scores = capped(scores, scale_log2 * (2.0 / SOFTCAP), SOFTCAP, INTERPRET)
            score_unit = 1.0
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
        weights, decay, maximum, total = _softmax_step(scores, maximum, total, score_unit)
        weights = weights.to(DTYPE)
        if INTERPRET:
            weights = weights.to(tl.float32)
        acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_rows = out_ptr + row.to(tl.int64) * stride_out_n + head * stride_out_h
    tl.store(out_rows[:, None] + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_output)
