"""Draw one token per row of edited logits on the device: Gumbel-max with keyed noise, no sort, no host sync.

`draw` is what is called; `sampling_filters` finds, for rows with min_p, top_k or top_p, the last id that is
kept, and this file's kernels draw among those up to it. Rows are independent: each has the bits it has alone.
Knows logits and eight words of parameters per row; knows no penalties, sequences or logprobs.

A tile of `_TILE` ids is one program. Scores are taken relative to the tile's largest logit, which keeps fp32
differences of close scores exact enough at any temperature; tiles are compared in fp64. Which ids share a
tile depends on the vocabulary alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.philox import gumbel, words_of_groups
from services.engine.kernels.gpu.rounding import is_interpreting
from services.engine.kernels.gpu.sampling_filters import find_bounds
from services.engine.kernels.gpu.sampling_row import INFINITY, load_temperature, rank_key

PARAM_WORDS = 8
"""int32 words per row: temperature (fp32 bits), top_k (0 = off), top_p (fp32 bits), min_p (fp32 bits), seed's
low and high 32 bits, sample index, completion offset."""
_TILE = 1024
_NUM_WARPS = 4
_REDUCE_WARPS = 1


@triton.jit
def _load_word(params_ptr, row, word: tl.constexpr, PARAM_WORDS: tl.constexpr):
    return tl.load(params_ptr + row * PARAM_WORDS + word).to(tl.uint32, bitcast=True)


@triton.jit
def _draw_kernel(
    logits_ptr,
    params_ptr,
    bounds_ptr,
    maxima_ptr,
    scores_ptr,
    ids_ptr,
    stride_logits_n,
    vocab,
    num_tiles,
    PARAM_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_FILTERS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Program (tile, row): the tile's largest logit, and its best score relative to that, and whose it is."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(logits_ptr + row * stride_logits_n + ids, mask=ids < vocab, other=-INFINITY)
    # NaN is no smaller than infinity: both show as an infinite maximum.
    logits = tl.where(logits < INFINITY, logits, INFINITY)
    largest = tl.max(logits, axis=0)
    best = -INFINITY
    best_id = 0
    is_live = (largest > -INFINITY) & (largest < INFINITY)
    if HAS_FILTERS:
        edge = tl.load(bounds_ptr + 2 * row)
        is_live &= rank_key(largest) >= edge
    if is_live:
        temperature = load_temperature(params_ptr + row * PARAM_WORDS)
        scores = (logits - largest) * tl.div_rn(1.0, tl.where(temperature > 0, temperature, 1.0))
        if temperature > 0:
            words = words_of_groups(
                tile * (TILE // 4) + tl.arange(0, TILE // 4),
                _load_word(params_ptr, row, 4, PARAM_WORDS),
                _load_word(params_ptr, row, 5, PARAM_WORDS),
                _load_word(params_ptr, row, 6, PARAM_WORDS),
                _load_word(params_ptr, row, 7, PARAM_WORDS),
            )
            scores += gumbel(words, INTERPRET)
        if HAS_FILTERS:
            keys = rank_key(logits)
            is_kept = (keys > edge) | ((keys == edge) & (ids <= tl.load(bounds_ptr + 2 * row + 1)))
            scores = tl.where(is_kept, scores, -INFINITY)
        best = tl.max(scores, axis=0)
        best_id = tl.min(tl.where(scores == best, ids, 0x7FFFFFFF), axis=0)
    at = row * num_tiles + tile
    tl.store(maxima_ptr + at, largest)
    tl.store(scores_ptr + at, best)
    tl.store(ids_ptr + at, best_id)


@triton.jit
def _draw_reduce_kernel(
    params_ptr,
    maxima_ptr,
    scores_ptr,
    ids_ptr,
    token_ids_ptr,
    status_ptr,
    num_tiles,
    PARAM_WORDS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (row): the best of the tiles' best, the lowest id among equals; whether the row is sound."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    is_inside = tiles < num_tiles
    at = row * num_tiles + tiles
    maxima = tl.load(maxima_ptr + at, mask=is_inside, other=-INFINITY)
    scores = tl.load(scores_ptr + at, mask=is_inside, other=-INFINITY)
    ids = tl.load(ids_ptr + at, mask=is_inside, other=0x7FFFFFFF)
    temperature = load_temperature(params_ptr + row * PARAM_WORDS)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    totals = maxima.to(tl.float64) / temperature.to(tl.float64) + scores.to(tl.float64)
    largest = tl.max(maxima, axis=0)
    is_sound = (largest > -INFINITY) & (largest < INFINITY)
    best_id = tl.min(tl.where(totals == tl.max(totals, axis=0), ids, 0x7FFFFFFF), axis=0)
    tl.store(token_ids_ptr + row, tl.where(is_sound, best_id, 0).to(tl.int64))
    tl.store(status_ptr + row, tl.where(is_sound, 0, 1))


def draw(logits: Tensor, params: Tensor, *, has_filters: bool, token_ids: Tensor, status: Tensor) -> None:
    """Draw a token for each row of edited logits.

    Args:
        logits: fp32 [n, vocab], rows may lie apart; bias, bans and penalties applied, -inf = banned.
        params: int32 [at least n, PARAM_WORDS], contiguous, on the device.
        has_filters: whether a row may have a top_k in (0, vocab), a top_p below 1 or a min_p above 0. Rows
            without give the same tokens either way.
        token_ids: int64 [at least n], written.
        status: int32 [at least n], written: 0 = fine; 1 = the row holds NaN or +inf, or nothing but -inf,
            and its token is 0.

    Raises:
        ValueError: a tensor has another shape, dtype or layout.
    """
    _check(logits, params, token_ids, status)
    rows, vocab = logits.shape
    if not rows:
        return
    tile = _tile(vocab)
    num_tiles = triton.cdiv(vocab, tile)
    # Three allocations, for alignment that does not depend on the number of rows.
    maxima = torch.empty((rows, num_tiles), dtype=torch.float32, device=logits.device)
    scores = torch.empty_like(maxima)
    ids = torch.empty_like(maxima, dtype=torch.int32)
    _draw_kernel[(num_tiles, rows)](
        logits,
        params,
        find_bounds(logits, params) if has_filters else params,
        maxima,
        scores,
        ids,
        logits.stride(0),
        vocab,
        num_tiles,
        PARAM_WORDS=PARAM_WORDS,
        TILE=tile,
        HAS_FILTERS=has_filters,
        INTERPRET=is_interpreting(),
        num_warps=_NUM_WARPS,
        # With filters or without, scores must have the same bits; what is fused might differ.
        enable_fp_fusion=False,
    )
    _draw_reduce_kernel[(rows,)](
        params,
        maxima,
        scores,
        ids,
        token_ids,
        status,
        num_tiles,
        PARAM_WORDS=PARAM_WORDS,
        TILES=triton.next_power_of_2(num_tiles),
        num_warps=_REDUCE_WARPS,
    )


def _tile(vocab: int) -> int:
    return max(4, min(_TILE, 1 << (vocab - 1).bit_length()))


def _check(logits: Tensor, params: Tensor, token_ids: Tensor, status: Tensor) -> None:
    if logits.dim() != 2 or not logits.shape[1] or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be fp32 [n, vocab] with values that lie together, found {logits.dtype} "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )
    rows = logits.shape[0]
    expected = (
        ("params", params, torch.int32, (PARAM_WORDS,)),
        ("token_ids", token_ids, torch.int64, ()),
        ("status", status, torch.int32, ()),
    )
    for name, tensor, dtype, shape in expected:
        is_shaped = tensor.dim() == 1 + len(shape) and tuple(tensor.shape[1:]) == shape
        if not is_shaped or tensor.shape[0] < rows or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {dtype} of shape {(f'>= {rows}', *shape)}, found {tensor.dtype} "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )


def compile_cases() -> list[CompileCase]:
    """The vocabulary of Llama 3."""
    vocab = 128256
    num_tiles = triton.cdiv(vocab, _TILE)
    partials = {"maxima_ptr": "*fp32", "scores_ptr": "*fp32", "ids_ptr": "*i32"}
    draws = [
        CompileCase(
            name=f"draw/vocab{vocab}" + ("/filtered" if has_filters else ""),
            kernel=_draw_kernel,
            signature={
                "logits_ptr": "*fp32",
                "params_ptr": "*i32",
                "bounds_ptr": "*i32",
                **partials,
                "stride_logits_n": "i32",
                "vocab": "i32",
                "num_tiles": "i32",
            },
            constexprs={
                "PARAM_WORDS": PARAM_WORDS,
                "TILE": _TILE,
                "HAS_FILTERS": has_filters,
                "INTERPRET": False,
            },
            num_warps=_NUM_WARPS,
            num_stages=3,
            has_fp_fusion=False,
            unaligned=frozenset(("num_tiles",)),
        )
        for has_filters in (False, True)
    ]
    return [
        *draws,
        CompileCase(
            name=f"draw_reduce/vocab{vocab}",
            kernel=_draw_reduce_kernel,
            signature={
                "params_ptr": "*i32",
                **partials,
                "token_ids_ptr": "*i64",
                "status_ptr": "*i32",
                "num_tiles": "i32",
            },
            constexprs={"PARAM_WORDS": PARAM_WORDS, "TILES": triton.next_power_of_2(num_tiles)},
            num_warps=_REDUCE_WARPS,
            num_stages=3,
            unaligned=frozenset(("num_tiles",)),
        ),
    ]
