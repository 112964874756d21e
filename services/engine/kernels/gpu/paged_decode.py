"""Attention of one query row per sequence over the blocked cache: split over the keys, any cache format.

Knows rows, blocks and formats of the cache; not who owns a block, nor how the rows came to be.

A program holds one kv head of one sequence, all query heads that share it, and one split: SPLIT keys from an
absolute multiple of SPLIT on (arXiv 2205.14135 for the running softmax, 2311.01282 for the split). Its result
and the logarithm of its weights' sum go to a workspace, where `paged_decode_reduce` adds splits in order.
Split and tile sizes depend on the shapes of the model and the cache alone, so a row has the same bits
whatever rows are beside it, whatever the bound on the context, and wherever its blocks lie.

Inside, everything is turned: scores are K.q with keys as the rows of the tensor cores' tiles and the query
heads as their columns, eight or sixteen, so that little tensor-core work is spent on absent query rows. Each
of the four warps keeps its own keys, maximum and sums (a *lane*), and lanes meet once, at the end of the
split: until then a tile costs no exchange between warps. V is read as words of two neighbouring tokens and paired in
registers (see `kv_codes`), because the other way to turn it, through shared memory, would need more of that
memory's bandwidth than a cache of 4 bits leaves.

A quantised cache is never dequantised: with u the operands, s and m a token's scale and minimum,
S = s (q.u) + m sum(q) and O = sum((p s) u) + sum(p m). p s is made an fp16 number, so the running maximum is
that of S + log2(s), the logarithm rounded down: p s then stays below 2^15 and reaches 2^14, however far apart
scales lie, while p itself stays in fp32, with room for scales down to 2^-64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.kv_codes import (
    codes_per_word,
    num_planes,
    operand_unit,
    pair_row,
    pair_tile,
    plane_column,
    plane_factor,
    plane_tile,
    row_factor,
)
from services.engine.kernels.gpu.paged_decode_reduce import paged_decode_reduce
from services.engine.kernels.gpu.rounding import has_fp8_conversion, is_interpreting
from services.engine.kernels.kv_format import FORMATS, LayerCache

SPLIT_SIZE = 512
"""Keys of a split. A constant: with another split a row has other bits."""
NUM_LANES = 4
NO_KEY = tl.constexpr(-1.0e30)
"""Maximum of a lane that has seen no key: finite, so that no infinity is taken from another."""


@triton.jit
def _dot(a, b, acc, INTERPRET: tl.constexpr):
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _power_to_fit(largest):
    """(2^e, 2^-e) such that largest * 2^e lies in [2^14, 2^15); e <= 120."""
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 21), 254)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def _owned(position, first_key, end):
    """The nearest position that the split reads: a table holds no block for others."""
    return tl.minimum(tl.maximum(position, first_key), end - 1)


@triton.jit
def _load(at, is_column, IS_PADDED: tl.constexpr):
    if IS_PADDED:
        return tl.load(at, mask=is_column, other=0)
    else:
        return tl.load(at)


@triton.jit
def _load_v(at, is_key, is_column, CAN_BE_NAN: tl.constexpr, IS_PADDED: tl.constexpr):
    if CAN_BE_NAN and IS_PADDED:
        return tl.load(at, mask=is_key[:, :, None] & is_column, other=0)
    elif CAN_BE_NAN:
        return tl.load(at, mask=is_key[:, :, None], other=0)
    else:
        return _load(at, is_column, IS_PADDED)


@triton.jit
def _query_planes(
    heads_ptr,
    is_head,
    up,
    HEAD_DIM: tl.constexpr,
    WORDS: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
):
    """The query heads at [1, 1, heads] times `up`, once for each plane of K in its order: a tuple of DTYPE
    [LANES, 2 * WORDS, heads].
    """
    index = tl.arange(0, 2 * WORDS)[None, :, None]
    planes = ()
    for j in tl.static_range(num_planes(FORMAT)):
        column = plane_column(index, j, FORMAT)
        plane = tl.load(heads_ptr + column, mask=is_head & (column < HEAD_DIM), other=0.0).to(tl.float32)
        plane = (plane * (up * plane_factor(j, FORMAT))).to(DTYPE)
        plane = tl.broadcast_to(plane, (LANES, plane.shape[1], plane.shape[2]))
        planes = planes + (plane,)  # noqa: RUF005, Triton has no unpacking
    return planes


@triton.jit
def _sum_of_lanes(x):
    """[rows, columns] of fp32 [4, rows, columns], added in registers after one exchange."""
    pairs = tl.permute(x, (1, 2, 0)).reshape(x.shape[1], x.shape[2], 2, 2)
    even, odd = tl.split(pairs)
    lane0, lane2 = tl.split(even)
    lane1, lane3 = tl.split(odd)
    return (lane0 + lane1) + (lane2 + lane3)


@triton.jit
def _paged_decode_kernel(
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
    IS_SINGLE: tl.constexpr,
    IS_WIDE: tl.constexpr,
    USE_CVT: tl.constexpr,
    INTERPRET: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    IS_QUANTIZED: tl.constexpr = FORMAT != "float"
    HAS_MINIMUM: tl.constexpr = FORMAT == "int8" or FORMAT == "int4"
    # Codes of integers cannot be NaN: what lies past the context is weighed with zero.
    CAN_BE_NAN: tl.constexpr = not HAS_MINIMUM
    USE_PERMUTE: tl.constexpr = not INTERPRET
    V_IN_WORDS: tl.constexpr = IS_QUANTIZED or not IS_WIDE
    HALF: tl.constexpr = tl.float16 if IS_QUANTIZED else query_ptr.dtype.element_ty
    DTYPE: tl.constexpr = tl.float32 if IS_WIDE else HALF
    CODES: tl.constexpr = codes_per_word(FORMAT)
    K_ROW: tl.constexpr = HEAD_DIM // CODES if IS_QUANTIZED else HEAD_DIM
    K_BLOCK: tl.constexpr = BLOCK_D // CODES if IS_QUANTIZED else BLOCK_D
    V_ROW: tl.constexpr = HEAD_DIM // CODES if V_IN_WORDS else HEAD_DIM
    V_BLOCK: tl.constexpr = BLOCK_D // CODES if V_IN_WORDS else BLOCK_D
    ROWS: tl.constexpr = BLOCK_N // LANES
    # Weights are kept times 2^14, to use the range of fp16; with codes, the exponents of V's scales, which are
    # biased by 127, are in the maximum as well.
    OFFSET: tl.constexpr = 141.0 if IS_QUANTIZED else (14.0 if tl.float16 == HALF else 0.0)

    sequence, split = tl.program_id(0), tl.program_id(2)
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(1) // HEAD_TILES
    member = tl.program_id(1) % HEAD_TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    is_member = member < GROUP
    head = kv_head * GROUP + member
    out_row = sequence.to(tl.int64) * (num_kv_heads * GROUP) + head
    if not IS_SINGLE:
        out_row = out_row * tl.num_programs(2) + split

    context = tl.load(context_lens_ptr + sequence)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(context - WINDOW, 0)
        split += first_key // SPLIT
    end = tl.minimum(split * SPLIT + SPLIT, context)
    begin = tl.maximum(split * SPLIT, first_key // BLOCK_N * BLOCK_N)
    element = tl.arange(0, BLOCK_D)
    if begin >= end:
        if IS_SINGLE:
            is_stored = (element < HEAD_DIM)[:, None] & is_member[None, :]
            nothing = tl.zeros((BLOCK_D, BLOCK_H), tl.float32)
            tl.store(out_ptr + out_row[None, :] * HEAD_DIM + element[:, None], nothing, mask=is_stored)
        return

    heads_ptr = query_ptr + sequence.to(tl.int64) * stride_query_s + head * stride_query_h
    if IS_QUANTIZED:
        is_query = is_member[:, None] & (element < HEAD_DIM)[None, :]
        query = tl.load(heads_ptr[:, None] + element[None, :], mask=is_query, other=0.0).to(tl.float32)
        up, down = _power_to_fit(tl.max(tl.abs(query)))
        query_sum = tl.sum((query * up).to(DTYPE).to(tl.float32), 1)[None, None, :] * (scale_log2 * down)
        k_unit = scale_log2 * down * operand_unit(FORMAT, USE_CVT)
        planes = _query_planes(
            heads_ptr[None, None, :], is_member[None, None, :], up, HEAD_DIM, K_BLOCK, FORMAT, DTYPE, LANES
        )
    else:
        is_query = (element < HEAD_DIM)[None, :, None] & is_member[None, None, :]
        query = tl.load(heads_ptr[None, None, :] + element[None, :, None], mask=is_query, other=0.0)
        query = tl.broadcast_to(query.to(DTYPE), (LANES, BLOCK_D, BLOCK_H))

    # Keys of the tile by lane, and the even ones among them.
    key = tl.arange(0, LANES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    even = tl.arange(0, LANES)[:, None] * ROWS + tl.arange(0, ROWS // 2)[None, :] * 2
    k_column, v_column = tl.arange(0, K_BLOCK)[None, None, :], tl.arange(0, V_BLOCK)[None, None, :]
    v_key = even if V_IN_WORDS else key
    k_inside, v_inside = key[:, :, None] * K_ROW + k_column, v_key[:, :, None] * V_ROW + v_column
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * stride_table
    # The table is read a tile ahead: an address that waits for a load would halve the loads in flight.
    if BLOCK_SIZE >= BLOCK_N:
        block = tl.load(table_ptr + begin // BLOCK_SIZE)
        v_block = block
    else:
        block = tl.load(table_ptr + _owned(begin + key, first_key, end) // BLOCK_SIZE)
        v_block = tl.load(table_ptr + _owned(begin + v_key, first_key, end) // BLOCK_SIZE)

    acc = tl.zeros((LANES, BLOCK_D, BLOCK_H), tl.float32)
    total = tl.zeros((LANES, ROWS, BLOCK_H), tl.float32)
    minimums = tl.zeros((LANES, ROWS, BLOCK_H), tl.float32)
    maximum = tl.full((LANES, 1, BLOCK_H), NO_KEY, tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        position, v_position = start + key, start + v_key
        is_key = (position < end) & (position >= first_key)
        after = start + BLOCK_N
        if BLOCK_SIZE >= BLOCK_N:
            # The tile lies in one block: one address for all.
            slot = (block.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + start % BLOCK_SIZE
            k_at, v_at = k_ptr + slot * K_ROW + k_inside, v_ptr + slot * V_ROW + v_inside
            params_at = slot + key
            block = tl.load(table_ptr + tl.minimum(after, end - 1) // BLOCK_SIZE)
        else:
            slot = (block.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
            v_slot = (v_block.to(tl.int64) * num_kv_heads + kv_head) * BLOCK_SIZE + v_position % BLOCK_SIZE
            k_at = (k_ptr + slot * K_ROW)[:, :, None] + k_column
            v_at = (v_ptr + v_slot * V_ROW)[:, :, None] + v_column
            params_at = slot
            block = tl.load(table_ptr + _owned(after + key, first_key, end) // BLOCK_SIZE)
            v_block = tl.load(table_ptr + _owned(after + v_key, first_key, end) // BLOCK_SIZE)
        # Keys past the context may be anything, their scores are replaced; of V, 0 x NaN would stay.
        k = _load(k_at, k_column < K_ROW, K_ROW < K_BLOCK)
        is_v = (v_position < end) & (v_position >= first_key)
        v = _load_v(v_at, is_v, v_column < V_ROW, CAN_BE_NAN, V_ROW < V_BLOCK)
        if V_IN_WORDS:
            is_v = (v_position + 1 < end) & (v_position + 1 >= first_key)
            odd = _load_v(v_at + V_ROW, is_v, v_column < V_ROW, CAN_BE_NAN, V_ROW < V_BLOCK)
            v = pair_tile(v, odd, HALF, FORMAT, USE_CVT, USE_PERMUTE)
        else:
            v = tl.permute(v, (0, 2, 1))

        scores = tl.zeros((LANES, ROWS, BLOCK_H), tl.float32)
        if IS_QUANTIZED:
            k_params = tl.load(k_params_ptr + params_at, mask=is_key, other=0)
            v_params = tl.load(v_params_ptr + params_at, mask=is_key, other=0)
            for j in tl.static_range(num_planes(FORMAT)):
                k_plane = plane_tile(k, j, FORMAT, USE_CVT, USE_PERMUTE).to(DTYPE)
                scores = _dot(k_plane, planes[j], scores, INTERPRET)
            scores *= ((k_params << 16).to(tl.float32, bitcast=True) * k_unit)[:, :, None]
            if HAS_MINIMUM:
                scores += (k_params & -65536).to(tl.float32, bitcast=True)[:, :, None] * query_sum
            # Scales of less than 2^-64 are not weighed down further: weights stay within fp32.
            exponent = tl.maximum((v_params >> 7) & 0xFF, 63).to(tl.float32)[:, :, None]
            scores = tl.where(is_key[:, :, None], scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores + exponent, 1, keep_dims=True))
        else:
            scores = _dot(k.to(DTYPE), query, scores, INTERPRET) * scale_log2
            scores = tl.where(is_key[:, :, None], scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, 1, keep_dims=True))
        decay = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - (new_maximum - OFFSET))
        maximum = new_maximum
        total = total * decay + weights
        if HAS_MINIMUM:
            minimum = (v_params & -65536).to(tl.float32, bitcast=True)[:, :, None]
            minimums = minimums * decay + weights * minimum
        if IS_QUANTIZED:
            weights *= (v_params << 16).to(tl.float32, bitcast=True)[:, :, None]
        acc = _dot(v.to(DTYPE), weights.to(DTYPE), acc * decay, INTERPRET)

    largest = tl.max(maximum, 0, keep_dims=True)
    share = tl.exp2(maximum - largest)
    total = tl.sum(tl.sum(total, 1) * share.reshape(LANES, BLOCK_H), 0)
    if IS_QUANTIZED:
        acc *= row_factor(element[None, :, None], V_BLOCK, FORMAT, USE_CVT)
    if HAS_MINIMUM:
        acc += tl.sum(minimums, 1, keep_dims=True)
    out = _sum_of_lanes(acc * share) * (1.0 / total)[None, :]
    if V_IN_WORDS:
        element = pair_row(element, V_BLOCK, FORMAT)
    is_stored = (element < HEAD_DIM)[:, None] & is_member[None, :]
    tl.store(out_ptr + out_row[None, :] * HEAD_DIM + element[:, None], out, mask=is_stored)
    if not IS_SINGLE:
        lse = largest.reshape(BLOCK_H) - OFFSET + tl.log2(total)
        tl.store(lse_ptr + out_row, lse, mask=is_member)


def num_splits(max_context: int, split_size: int = SPLIT_SIZE, sliding_window: int | None = None) -> int:
    """Splits that a context of at most `max_context` tokens can touch."""
    splits = max(1, -(-max_context // split_size))
    if sliding_window is None:
        return splits
    # A window that begins at the last key of a split.
    return min(splits, (sliding_window + split_size - 2) // split_size + 1)


def workspace_size(num_sequences: int, num_heads: int, head_dim: int, splits: int) -> int:
    """fp32 elements that a launch with more than one split writes between its two kernels."""
    return num_sequences * num_heads * splits * (head_dim + 1)


def paged_decode(
    query: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    max_context: int,
    sliding_window: int | None = None,
    split_size: int = SPLIT_SIZE,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Attention of the last position of each sequence over its context: [num_seqs, heads, head_dim].

    Args:
        query: [num_seqs, heads, head_dim], a vector's values adjacent; heads a multiple of the kv heads.
        cache: dense tensors; block_size a power of two from 16 on; head_dim a multiple of 8, up to 256.
        block_tables: int32 [num_seqs, max_blocks], rows may be apart; entries without keys are not read.
        context_lens: int32 [num_seqs], the query's own position included; 0 for a padding row: zeros.
        scale: of the scores, before the softmax.
        max_context: bound of context_lens on the host: sizes the grid. A context beyond it is cut.
        sliding_window: keys a row sees, its own included.
        split_size: keys of a split, a power of two from 128 on; other sizes give other bits.
        workspace: fp32 with at least `workspace_size` elements, instead of an allocation.

    Raises ValueError for shapes that do not fit.
    """
    _check(query, cache, block_tables, context_lens, split_size, sliding_window)
    num_seqs, num_heads, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    if not out.is_contiguous() or out.shape != query.shape:
        raise ValueError(f"out must be dense {tuple(query.shape)}: {tuple(out.shape)}")
    if num_seqs == 0:
        return out
    splits = num_splits(max_context, split_size, sliding_window)
    target, lse = out, out
    if splits > 1:
        size = num_seqs * num_heads * splits
        if workspace is None:
            workspace = torch.empty(size * (head_dim + 1), dtype=torch.float32, device=query.device)
        elif workspace.numel() < size * (head_dim + 1) or workspace.dtype != torch.float32:
            raise ValueError(
                f"workspace of {workspace.numel()} {workspace.dtype}, {size * (head_dim + 1)} fp32 needed"
            )
        flat = workspace.view(-1)
        target, lse = flat[: size * head_dim], flat[size * head_dim : size * (head_dim + 1)]
    config = _config(query.dtype, cache, num_heads, head_dim, split_size, sliding_window)
    head_tiles = -(-config["GROUP"] // config["BLOCK_H"])
    k, v = _as_operands(cache, config["IS_WIDE"])
    _paged_decode_kernel[(num_seqs, cache.num_kv_heads * head_tiles, splits)](
        target,
        lse,
        query,
        k,
        v,
        k if cache.k_params is None else cache.k_params,
        v if cache.v_params is None else cache.v_params,
        block_tables,
        context_lens,
        scale * math.log2(math.e),
        cache.num_kv_heads,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        **config,
        IS_SINGLE=splits == 1,
        USE_CVT=cache.kv_format.name == "fp8" and has_fp8_conversion(query.device),
        INTERPRET=is_interpreting(),
        num_warps=NUM_LANES,
        num_stages=config["NUM_STAGES"],
    )
    if splits > 1:
        paged_decode_reduce(target, lse, context_lens, out, splits, split_size, sliding_window)
    return out


def _config(
    dtype: torch.dtype,
    cache: LayerCache,
    num_heads: int,
    head_dim: int,
    split_size: int,
    sliding_window: int | None,
) -> dict[str, Any]:
    """Constants of the launch: by the shapes of the model and the cache, never by the batch's."""
    kv_format = cache.kv_format
    block_d = max(64, triton.next_power_of_2(head_dim))
    group = num_heads // cache.num_kv_heads
    is_wide = dtype == torch.float32 or (not kv_format.is_quantized and dtype != kv_format.storage)
    block_n, num_stages = _tile(kv_format.bytes_per_vector(block_d), is_wide)
    return {
        "FORMAT": kv_format.name if kv_format.is_quantized else "float",
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_SIZE": cache.block_size,
        "BLOCK_H": 8 if group <= 8 else 16,
        "BLOCK_N": block_n,
        "LANES": NUM_LANES,
        "SPLIT": split_size,
        "WINDOW": sliding_window or 0,
        "IS_WIDE": is_wide,
        "NUM_STAGES": num_stages,
    }


def _tile(vector_bytes: int, is_wide: bool) -> tuple[int, int]:
    """(keys of a tile, stages of the pipeline) for K and V vectors of so many bytes each."""
    if is_wide or vector_bytes > 256:
        return 64, 2
    if vector_bytes > 140:
        return 64, 3
    return 128, 3 if vector_bytes < 100 else 2


def _as_operands(cache: LayerCache, is_wide: bool) -> tuple[Tensor, Tensor]:
    """K and V as the kernel reads them: words of codes; V of 16 bits in words of two values."""
    if cache.kv_format.is_quantized:
        return cache.k.view(torch.int32), cache.v.view(torch.int32)
    return cache.k, cache.v if is_wide else cache.v.view(torch.int32)


def _check(
    query: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    context_lens: Tensor,
    split_size: int,
    sliding_window: int | None,
) -> None:
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
    for params in (cache.k_params, cache.v_params) if cache.kv_format.is_quantized else ():
        if params is None or params.shape != (blocks, kv_heads, block_size) or not params.is_contiguous():
            raise ValueError(
                f"a cache of {cache.kv_format.name} needs dense params {(blocks, kv_heads, block_size)}"
            )
    for name, tensor in (("block_tables", block_tables), ("context_lens", context_lens)):
        if tensor.dtype != torch.int32 or tensor.shape[0] != num_seqs or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be int32 for {num_seqs} sequences: {tensor.dtype} {tuple(tensor.shape)}"
            )


def compile_cases() -> list[CompileCase]:
    """Launches as `paged_decode` makes them: formats, groups, head sizes and block sizes."""
    cases = []
    for name in ("bfloat16", "fp8", "int8", "int4"):
        cases += [
            _case(name, 4, 128, 128),
            _case(name, 8, 128, 128),
            _case(name, 16, 128, 128),
            _case(name, 4, 128, 16),
            _case(name, 1, 64, 128),
            _case(name, 3, 80, 128),
            _case(name, 8, 256, 128, window=4096),
        ]
    cases.append(_case("fp8", 4, 128, 128, use_cvt=False))
    cases.append(_case("float16", 4, 128, 128))
    cases.append(_case("float32", 4, 128, 128))
    return cases


_GATES = {"bfloat16": 2.5, "float16": 2.5, "fp8": 4.5, "int8": 4.5, "int4": 3.9}


def _case(
    format_name: str, group: int, head_dim: int, block_size: int, *, window: int = 0, use_cvt: bool = True
) -> CompileCase:
    kv_format = FORMATS[format_name]
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(format_name, torch.bfloat16)
    shape = (1, 1, block_size, kv_format.row_size(head_dim))
    cache = LayerCache(kv_format, torch.empty(shape, dtype=kv_format.storage), torch.empty(0))
    constexprs = _config(dtype, cache, group, head_dim, SPLIT_SIZE, window)
    use_cvt = use_cvt and format_name == "fp8"
    constexprs |= {"IS_SINGLE": False, "USE_CVT": use_cvt, "INTERPRET": False}
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    words = "*i32" if kv_format.is_quantized else pointer
    is_main = head_dim == 128 and group in (4, 8) and block_size == 128 and format_name != "float32"
    return CompileCase(
        name=f"paged_decode/{format_name}/group{group}/head_dim{head_dim}/block{block_size}"
        + ("" if use_cvt or format_name != "fp8" else "/integers"),
        kernel=_paged_decode_kernel,
        signature={
            "out_ptr": "*fp32",
            "lse_ptr": "*fp32",
            "query_ptr": pointer,
            "k_ptr": words,
            "v_ptr": words if constexprs["IS_WIDE"] else "*i32",
            "k_params_ptr": "*i32",
            "v_params_ptr": "*i32",
            "block_tables_ptr": "*i32",
            "context_lens_ptr": "*i32",
            "scale_log2": "fp32",
            "num_kv_heads": "i32",
            "stride_query_s": "i32",
            "stride_query_h": "i32",
            "stride_table": "i32",
        },
        constexprs=constexprs,
        num_warps=NUM_LANES,
        num_stages=constexprs["NUM_STAGES"],
        unaligned=frozenset({"num_kv_heads", "stride_table"}),
        elements_per_iteration=2 * constexprs["BLOCK_N"] * head_dim,
        max_instructions=_GATES[format_name] if is_main else None,
        has_tensor_cores=not constexprs["IS_WIDE"],
        notes={"sm_80": "float8 is converted by integers there"} if use_cvt else {},
    )
