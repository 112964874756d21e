"""The kernel of `paged_decode`. Device functions only: knows pointers, strides and tile sizes.

A program holds one kv head of one sequence, all query heads that share it, and one split at a time: SPLIT
keys from an absolute multiple of SPLIT on (arXiv 2205.14135 for the running softmax, 2311.01282 for the
split). It writes the split's result and the logarithm of its weights' sum.

Inside, everything is turned: scores are K.q with keys as the rows of the tensor cores' tiles and the query
heads as their columns, eight or sixteen, so that little tensor-core work is spent on absent query rows. Each
of the four warps keeps its own keys, maximum and sums (a *lane*), and lanes meet once, at the end of the
split: until then a tile costs no exchange between warps. V is read as words of two neighbouring tokens and
paired in registers (see `kv_codes`), because the other way to turn it, through shared memory, would need more
of that memory's bandwidth than a cache of 4 bits leaves.

A quantised cache is never dequantised: with u the operands, s and m a token's scale and minimum,
S = s (q.u) + m sum(q) and O = sum((p s) u) + sum(p m). p s is made an fp16 number, so the running maximum is
that of S + log2(s), the logarithm rounded down: p s then stays below 2^15 and reaches 2^14, however far apart
scales lie, while p itself stays in fp32, with room for scales down to 2^-64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.kv_codes import (
    codes_per_word,
    num_planes,
    operand_unit,
    pair_row,
    pair_tile,
    plane_tile,
    row_factor,
)
from services.engine.kernels.gpu.paged_decode_tile import (
    chunks_of_words,
    dot,
    in_order,
    is_seen,
    load_k,
    load_v,
    owned,
    pairs_of_keys,
    power_to_fit,
    query_planes,
    splits_of,
    sum_of_lanes,
)
from services.engine.kernels.gpu.softcap import capped

UNALIGNED = ("num_splits", "num_kv_heads", "stride_table", "block_tables_ptr", "context_lens_ptr")
"""Arguments that may be any number: no kernel of its own for those that happen to be divisible by 16."""
NO_KEY = tl.constexpr(-1.0e30)
"""Maximum of a lane that has seen no key: finite, so that no infinity is taken from another."""


@triton.jit(do_not_specialize=UNALIGNED[:3], do_not_specialize_on_alignment=UNALIGNED[3:])
def paged_decode_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    k_ptr,
    v_ptr,
    k_params_ptr,
    v_params_ptr,
    block_tables_ptr,
    context_lens_ptr,
    scale_log2,
    num_splits,
    num_kv_heads,
    stride_query_s,
    stride_query_h,
    stride_table,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    IS_WIDE: tl.constexpr,
    USE_CVT: tl.constexpr,
    INTERPRET: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    sequence = tl.program_id(0)
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(1) // HEAD_TILES
    member = tl.program_id(1) % HEAD_TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + member
    context = tl.load(context_lens_ptr + sequence)
    splits, first_split = splits_of(context, num_splits, SPLIT, WINDOW)
    if IS_SINGLE:
        # A padding row is written too.
        splits = 1
    row = sequence.to(tl.int64) * (num_kv_heads * GROUP) + head
    for split in range(tl.program_id(2), splits, tl.num_programs(2)):
        _attend(
            out_ptr, lse_ptr, query_ptr + sequence.to(tl.int64) * stride_query_s + head * stride_query_h,
            k_ptr, v_ptr, k_params_ptr, v_params_ptr, block_tables_ptr + sequence.to(tl.int64) * stride_table,
            scale_log2, num_kv_heads, kv_head, member < GROUP,
            row * num_splits + split, first_split + split, context,
            FORMAT, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_H, BLOCK_N, LANES, SPLIT, WINDOW, SOFTCAP,
            IS_SINGLE, IS_WIDE, USE_CVT, INTERPRET, NUM_STAGES,
        )  # fmt: skip


@triton.jit
def _attend(
    out_ptr,
    lse_ptr,
    heads_ptr,
    k_ptr,
    v_ptr,
    k_params_ptr,
    v_params_ptr,
    table_ptr,
    scale_log2,
    num_kv_heads,
    kv_head,
    is_member,
    out_row,
    split,
    context,
    FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    IS_WIDE: tl.constexpr,
    USE_CVT: tl.constexpr,
    INTERPRET: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One split of one sequence: its keys' share of the output and the logarithm of their weights' sum."""
    IS_QUANTIZED: tl.constexpr = FORMAT != "float"
    HAS_MINIMUM: tl.constexpr = FORMAT == "int8" or FORMAT == "int4"
    # Codes of integers cannot be NaN: what lies past the context is weighed with zero.
    CAN_BE_NAN: tl.constexpr = not HAS_MINIMUM
    USE_PERMUTE: tl.constexpr = not INTERPRET
    V_IN_WORDS: tl.constexpr = IS_QUANTIZED or not IS_WIDE
    HALF: tl.constexpr = tl.float16 if IS_QUANTIZED else heads_ptr.dtype.element_ty
    DTYPE: tl.constexpr = tl.float32 if IS_WIDE else HALF
    CODES: tl.constexpr = codes_per_word(FORMAT)
    K_ROW: tl.constexpr = HEAD_DIM // CODES if IS_QUANTIZED else HEAD_DIM
    K_BLOCK: tl.constexpr = BLOCK_D // CODES if IS_QUANTIZED else BLOCK_D
    V_ROW: tl.constexpr = HEAD_DIM // CODES if V_IN_WORDS else HEAD_DIM
    V_BLOCK: tl.constexpr = BLOCK_D // CODES if V_IN_WORDS else BLOCK_D
    ROWS: tl.constexpr = BLOCK_N // LANES
    # Weights are kept times 2^14, to use the range of fp16; with codes the maximum has V's exponents in it,
    # biased by 127.
    OFFSET: tl.constexpr = 141.0 if IS_QUANTIZED else (14.0 if tl.float16 == HALF else 0.0)

    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(context - WINDOW, 0)
    end = tl.minimum(split * SPLIT + SPLIT, context)
    begin = tl.maximum(split * SPLIT, first_key // BLOCK_N * BLOCK_N)
    element = tl.arange(0, BLOCK_D)
    if IS_QUANTIZED:
        is_query = is_member[:, None] & (element < HEAD_DIM)[None, :]
        query = tl.load(heads_ptr[:, None] + element[None, :], mask=is_query, other=0.0).to(tl.float32)
        up, down = power_to_fit(tl.max(tl.abs(query)))
        query_sum = tl.sum((query * up).to(DTYPE).to(tl.float32), 1)[None, None, :] * (scale_log2 * down)
        k_unit = scale_log2 * down * operand_unit(FORMAT, USE_CVT)
        planes = query_planes(
            heads_ptr[None, None, :], is_member[None, None, :], up, HEAD_DIM, K_BLOCK, FORMAT, DTYPE, LANES
        )
    else:
        is_query = (element < HEAD_DIM)[None, :, None] & is_member[None, None, :]
        query = tl.load(heads_ptr[None, None, :] + element[None, :, None], mask=is_query, other=0.0)
        query = tl.broadcast_to(query.to(DTYPE), (LANES, BLOCK_D, BLOCK_H))

    key = tl.arange(0, LANES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    k_column = tl.arange(0, K_BLOCK)[None, None, :]
    if V_IN_WORDS:
        v_key, v_column = pairs_of_keys(LANES, ROWS), chunks_of_words(V_BLOCK)
    else:
        v_key, v_column = key[:, :, None], k_column
    k_inside, v_inside = key[:, :, None] * K_ROW + k_column, v_key * V_ROW + v_column
    # The table is read a tile ahead: an address that waits for a load would halve the loads in flight.
    if BLOCK_SIZE >= BLOCK_N:
        block = tl.load(table_ptr + owned(begin, first_key, end) // BLOCK_SIZE)
        v_block = block
    else:
        block = tl.load(table_ptr + owned(begin + key, first_key, end) // BLOCK_SIZE)
        v_block = tl.load(table_ptr + owned(begin + v_key, first_key, end) // BLOCK_SIZE)

    acc = tl.zeros((LANES, BLOCK_D, BLOCK_H), tl.float32)
    total = tl.zeros((LANES, ROWS, BLOCK_H), tl.float32)
    minimums = tl.zeros((LANES, ROWS, BLOCK_H), tl.float32)
    maximum = tl.full((LANES, 1, BLOCK_H), NO_KEY, tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        position, v_position = start + key, start + v_key
        is_key = is_seen(position, first_key, end, WINDOW)
        after = start + BLOCK_N
        if BLOCK_SIZE >= BLOCK_N:
            # The tile lies in one block: one address for all.
            slot = (block.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + (start & (BLOCK_SIZE - 1))
            k_at, v_at = k_ptr + slot * K_ROW + k_inside, v_ptr + slot * V_ROW + v_inside
            params_at = slot + key
            block = tl.load(table_ptr + owned(after, first_key, end) // BLOCK_SIZE)
        else:
            slot = (block.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + (position & (BLOCK_SIZE - 1))
            v_slot = (v_block.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + (
                v_position & (BLOCK_SIZE - 1)
            )
            k_at = (k_ptr + slot * K_ROW)[:, :, None] + k_column
            v_at = v_ptr + v_slot * V_ROW + v_column
            params_at = slot
            block = tl.load(table_ptr + owned(after + key, first_key, end) // BLOCK_SIZE)
            v_block = tl.load(table_ptr + owned(after + v_key, first_key, end) // BLOCK_SIZE)
        # Keys past the context may be anything, their scores are replaced; of V, 0 x NaN would stay.
        k = load_k(k_at, k_column < K_ROW, K_ROW < K_BLOCK)
        is_v = is_seen(v_position, first_key, end, WINDOW)
        v = load_v(v_at, is_v, v_column < V_ROW, CAN_BE_NAN, V_ROW < V_BLOCK)
        if V_IN_WORDS:
            is_v = is_seen(v_position + 1, first_key, end, WINDOW)
            odd = load_v(v_at + V_ROW, is_v, v_column < V_ROW, CAN_BE_NAN, V_ROW < V_BLOCK)
            v, odd = in_order(v), in_order(odd)
            v = pair_tile(v, odd, HALF, FORMAT, USE_CVT, USE_PERMUTE)
        else:
            v = tl.permute(v, (0, 2, 1))

        scores = tl.zeros((LANES, ROWS, BLOCK_H), tl.float32)
        if IS_QUANTIZED:
            k_params = tl.load(k_params_ptr + params_at, mask=is_key, other=0)
            v_params = tl.load(v_params_ptr + params_at, mask=is_key, other=0)
            for j in tl.static_range(num_planes(FORMAT)):
                k_plane = plane_tile(k, j, FORMAT, USE_CVT, USE_PERMUTE).to(DTYPE)
                scores = dot(k_plane, planes[j], scores, INTERPRET)
            scores *= ((k_params << 16).to(tl.float32, bitcast=True) * k_unit)[:, :, None]
            if HAS_MINIMUM:
                minimum = (k_params & -65536).to(tl.float32, bitcast=True)[:, :, None]
                scores = tl.fma(minimum, query_sum, scores)
            if SOFTCAP > 0.0:
                scores = capped(scores, 2.0 / SOFTCAP, SOFTCAP, INTERPRET)
            # Scales of less than 2^-64 are not weighed down further: weights stay within fp32.
            exponent = tl.maximum((v_params >> 7) & 0xFF, 63).to(tl.float32)[:, :, None]
            scores = tl.where(is_key[:, :, None], scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores + exponent, 1, keep_dims=True))
        else:
            scores = dot(k.to(DTYPE), query, scores, INTERPRET) * scale_log2
            if SOFTCAP > 0.0:
                scores = capped(scores, 2.0 / SOFTCAP, SOFTCAP, INTERPRET)
            scores = tl.where(is_key[:, :, None], scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, 1, keep_dims=True))
        decay = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - (new_maximum - OFFSET))
        maximum = new_maximum
        total = tl.fma(total, decay, weights)
        if HAS_MINIMUM:
            minimum = (v_params & -65536).to(tl.float32, bitcast=True)[:, :, None]
            minimums = tl.fma(minimums, decay, weights * minimum)
        if IS_QUANTIZED:
            weights *= (v_params << 16).to(tl.float32, bitcast=True)[:, :, None]
        acc = dot(v.to(DTYPE), weights.to(DTYPE), acc * decay, INTERPRET)

    largest = tl.max(maximum, 0, keep_dims=True)
    share = tl.exp2(maximum - largest)
    total = tl.sum(tl.sum(total, 1) * share.reshape(LANES, BLOCK_H), 0)
    if IS_QUANTIZED:
        acc *= row_factor(element[None, :, None], V_BLOCK, FORMAT, USE_CVT) * share
        if HAS_MINIMUM:
            acc += tl.sum(minimums, 1, keep_dims=True) * share
    else:
        acc *= share
    # A padding row has no key: zeros.
    out = sum_of_lanes(acc) * (1.0 / tl.where(total > 0.0, total, 1.0))[None, :]
    if V_IN_WORDS:
        element = pair_row(element, V_BLOCK, FORMAT)
    is_stored = (element < HEAD_DIM)[:, None] & is_member[None, :]
    tl.store(out_ptr + out_row[None, :] * HEAD_DIM + element[:, None], out, mask=is_stored)
    if not IS_SINGLE:
        lse = largest.reshape(BLOCK_H) - OFFSET + tl.log2(total)
        tl.store(lse_ptr + out_row, lse, mask=is_member)
