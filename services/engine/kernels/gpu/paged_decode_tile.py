"""Pieces of the decode kernel: what it loads, in which order, and how its lanes meet. Device functions only.

A lane is one warp's share of a tile of keys. Nothing here knows blocks, splits or the running softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.kv_codes import num_planes, plane_column, plane_factor


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def power_to_fit(largest):
    """(2^e, 2^-e) such that largest * 2^e lies in [2^14, 2^15); e <= 120."""
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 21), 254)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def splits_of(context, num_splits, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """(how many splits the row sees a key of, at most `num_splits`; the first of them)."""
    splits, first = (context + SPLIT - 1) // SPLIT, 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // SPLIT
    return tl.minimum(splits - first, num_splits), first


@triton.jit
def is_seen(position, first_key, end, WINDOW: tl.constexpr):
    """Whether the row sees the key at a position of the split."""
    if WINDOW > 0:
        return (position < end) & (position >= first_key)
    else:
        return position < end


@triton.jit
def owned(position, first_key, end):
    """The nearest position that the row sees, not negative: the table may hold no block for others."""
    return tl.maximum(tl.minimum(position, end - 1), first_key)


@triton.jit
def pairs_of_keys(LANES: tl.constexpr, ROWS: tl.constexpr):
    """The even keys of the tile, [LANES, ROWS / 16, 2, 1, 4, 1]: of sixteen rows, the pair 2c + b at [b, c].

    The four threads that hold neighbouring pairs of a row then read chunks that lie side by side in shared
    memory, where rows of V under one another would meet in the same banks.
    """
    sixteen = tl.arange(0, ROWS // 16)[None, :, None, None, None, None] * 16
    pair = (
        tl.arange(0, 2)[None, None, :, None, None, None]
        + 2 * tl.arange(0, 4)[None, None, None, None, :, None]
    )
    return tl.arange(0, LANES)[:, None, None, None, None, None] * ROWS + sixteen + 2 * pair


@triton.jit
def chunks_of_words(WORDS: tl.constexpr):
    """Words of a row, [1, 1, 1, WORDS / 4, 1, 4]: what one thread copies from device memory at once."""
    chunk = tl.arange(0, WORDS // 4)[None, None, None, :, None, None]
    return chunk * 4 + tl.arange(0, 4)[None, None, None, None, None, :]


@triton.jit
def in_order(words):
    """[lanes, pairs, words] of words at `pairs_of_keys` and `chunks_of_words`."""
    turned = tl.permute(words, (0, 1, 4, 2, 3, 5))
    return turned.reshape(words.shape[0], 8 * words.shape[1], 4 * words.shape[3])


@triton.jit
def load_k(at, is_column, IS_PADDED: tl.constexpr):
    if IS_PADDED:
        return tl.load(at, mask=is_column, other=0)
    else:
        return tl.load(at)


@triton.jit
def load_v(at, is_key, is_column, CAN_BE_NAN: tl.constexpr, IS_PADDED: tl.constexpr):
    if CAN_BE_NAN and IS_PADDED:
        return tl.load(at, mask=is_key & is_column, other=0)
    elif CAN_BE_NAN:
        return tl.load(at, mask=is_key, other=0)
    else:
        return load_k(at, is_column, IS_PADDED)


@triton.jit
def query_planes(
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
def sum_of_lanes(x):
    """[rows, columns] of fp32 [4, rows, columns], added in registers after one exchange."""
    pairs = tl.permute(x, (1, 2, 0)).reshape(x.shape[1], x.shape[2], 2, 2)
    even, odd = tl.split(pairs)
    lane0, lane2 = tl.split(even)
    lane1, lane3 = tl.split(odd)
    return (lane0 + lane1) + (lane2 + lane3)
