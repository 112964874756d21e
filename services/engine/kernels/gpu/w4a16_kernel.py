"""The kernel of `w4a16`. Device functions only: knows pointers, strides and tile sizes.

y^T = W x^T: the weight is the left operand, which a tensor core takes from registers, so a weight goes from
memory to registers once and never back to shared memory; x, the right operand, is read from shared memory.
One or sixteen rows of x are the narrow side of the product, so even one row uses the tensor core.

The product takes v - z, which is exact, and sums over a group are multiplied by the group's scale; or it
takes the scaled weight, rounded once. The former costs work that grows with the rows, the latter does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.rounding import round_to
from services.engine.kernels.gpu.silu_mul import activate
from services.engine.kernels.gpu.w4a16_tile import dequantize_tile


@triton.jit
def _params_pointers(
    params_ptr,
    tile,
    param_rows,
    is_whole,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Pointers [BLOCK_N, spans of a block] to the params of the first block of inputs."""
    NUM_SPANS: tl.constexpr = BLOCK_K // SPAN if SPAN < BLOCK_K else 1
    PER_ROW: tl.constexpr = 128 // SPAN
    n = tl.arange(0, BLOCK_N)
    stride_tile = param_rows * (128 * PER_ROW)
    offsets = (n // 128) * (stride_tile * is_whole) + (n % 128) * PER_ROW
    return params_ptr + tile * stride_tile + (offsets[:, None] + tl.arange(0, NUM_SPANS)[None, :])


@triton.jit
def _params_offset(block, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr):
    """Where the params of a block of inputs begin, after those of the first."""
    PER_ROW: tl.constexpr = 128 // SPAN
    if PER_ROW == 1:
        return (block * BLOCK_K // GROUP) * 128
    elif BLOCK_K == 128:
        return block * (128 * PER_ROW)
    else:
        return (block // 2) * (128 * PER_ROW) + (block % 2) * (PER_ROW // 2)


@triton.jit
def _multiply(weight, x_ptrs, is_row, limit, EVEN_K: tl.constexpr, INTERPRET: tl.constexpr):
    """weight [BLOCK_N, K] times K inputs of each row at x_ptrs [K, BLOCK_M]; inputs from `limit` on are 0."""
    K: tl.constexpr = weight.shape[1]
    mask = is_row if EVEN_K else is_row & (tl.arange(0, K)[:, None] < limit)
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if INTERPRET:
        x = x.to(tl.float32)
    return tl.dot(weight, x, input_precision="ieee")


@triton.jit
def _multiply_spans(
    acc,
    weight,
    scale,
    x_ptrs,
    is_row,
    limit,
    NUM_SPANS: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """acc + the products of NUM_SPANS equal parts of the inputs, each times its scale [BLOCK_N, NUM_SPANS].

    A loop over the parts could not index registers: the parts are taken apart by halves, left first.
    """
    ROWS: tl.constexpr = weight.shape[0]
    if NUM_SPANS == 1:
        product = _multiply(weight, x_ptrs, is_row, limit, EVEN_K, INTERPRET)
        acc += scale.reshape(ROWS, 1) * product
        return acc
    else:
        PART: tl.constexpr = weight.shape[1] // 2
        HALF: tl.constexpr = NUM_SPANS // 2
        left, right = tl.split(weight.reshape(ROWS, 2, PART).permute(0, 2, 1))
        left_scale, right_scale = tl.split(scale.reshape(ROWS, 2, HALF).permute(0, 2, 1))
        acc = _multiply_spans(acc, left, left_scale, x_ptrs, is_row, limit, HALF, EVEN_K, INTERPRET)
        x_ptrs += PART
        limit -= PART
        return _multiply_spans(acc, right, right_scale, x_ptrs, is_row, limit, HALF, EVEN_K, INTERPRET)


@triton.jit
def _output_columns(pid_n, out_features, BLOCK_N: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """(output, whether it exists) of each row of a tile."""
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if IS_INTERLEAVED:
        half = out_features // 2
        column = (n // 16) * 8 + n % 8
        return column + (n // 8 % 2) * half, column < half
    else:
        return n, n < out_features


@triton.jit
def _store_activation_mul(
    acc,
    out_ptr,
    rows,
    pid_n,
    num_rows,
    out_features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """activation(gate) * up of an interleaved tile: a gate and its up lie 8 rows apart, in one thread."""
    gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
    y = (activate(gate, ACTIVATION) * up).reshape(BLOCK_N // 2, BLOCK_M)
    width = out_features // 2
    column = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    mask = (rows[None, :] < num_rows) & (column < width)[:, None]
    pointers = out_ptr + rows[None, :].to(tl.int64) * width + column[:, None]
    tl.store(pointers, round_to(y, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "param_rows", "blocks_per_split"])
def w4a16_kernel(
    x_ptr,
    words_ptr,
    params_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    param_rows,
    blocks_per_split,
    stride_x_m,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program: BLOCK_N outputs of BLOCK_M rows, over one split of the inputs."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = BLOCK_K * 16
    NUM_SPANS: tl.constexpr = BLOCK_K // SPAN if SPAN < BLOCK_K else 1
    DOT_K: tl.constexpr = BLOCK_K if HAS_SCALE else BLOCK_K // NUM_SPANS
    pid_m, pid_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_blocks = tl.cdiv(in_features, 128) * (128 // BLOCK_K)
    start = split * blocks_per_split
    stop = tl.minimum(start + blocks_per_split, num_blocks)

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows[None, :] < num_rows
    x_ptrs = x_ptr + rows[None, :].to(tl.int64) * stride_x_m + tl.arange(0, DOT_K)[:, None]
    tile = pid_n.to(tl.int64) * (BLOCK_N // 128)
    stride_tile = num_blocks * WORDS
    word = tl.arange(0, BLOCK_N * BLOCK_K // 8)
    # The second 128 outputs of a wide tile may not exist: the first are read again, and not stored.
    num_tiles = tl.cdiv(out_features, 128)
    if IS_INTERLEAVED:
        num_tiles = tl.cdiv(out_features // 2, 64)
    is_whole = (tile + BLOCK_N // 128 <= num_tiles).to(tl.int32)
    stride_next = stride_tile * is_whole
    words_ptrs = words_ptr + tile * stride_tile + ((word // WORDS) * stride_next + word % WORDS)
    params_ptrs = _params_pointers(params_ptr, tile, param_rows, is_whole, BLOCK_N, BLOCK_K, SPAN)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(start, stop, num_stages=NUM_STAGES, loop_unroll_factor=UNROLL):
        words = tl.load(words_ptrs + block * WORDS)
        params = tl.load(params_ptrs + _params_offset(block, GROUP, BLOCK_K, SPAN))
        weight, scale = dequantize_tile(words, params, DTYPE, BLOCK_N, BLOCK_K, SPAN, HAS_SCALE, INTERPRET)
        x_block = x_ptrs + block * BLOCK_K
        limit = in_features - block * BLOCK_K
        if HAS_SCALE:
            acc += _multiply(weight, x_block, is_row, limit, EVEN_K, INTERPRET)
        else:
            acc = _multiply_spans(acc, weight, scale, x_block, is_row, limit, NUM_SPANS, EVEN_K, INTERPRET)

    n, is_output = _output_columns(pid_n, out_features, BLOCK_N, IS_INTERLEAVED)
    if IS_PARTIAL:
        base = (split.to(tl.int64) * num_rows + rows[None, :]) * out_features
        tl.store(out_ptr + base + n[:, None], acc, mask=is_row & is_output[:, None])
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
        if ACTIVATION != "":
            _store_activation_mul(
                acc, out_ptr, rows, pid_n, num_rows, out_features, BLOCK_M, BLOCK_N, ACTIVATION, INTERPRET
            )
        else:
            offsets = rows[None, :].to(tl.int64) * out_features + n[:, None]
            mask = is_row & is_output[:, None]
            if residual_ptr is not None:
                acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + offsets, round_to(acc, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
