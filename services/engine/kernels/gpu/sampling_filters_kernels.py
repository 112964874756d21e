"""The four kernels of `sampling_filters`: scan, floor, collect, select. Device functions only.

They know pointers, strides and sizes of tiles; how an edge is searched is `sampling_search`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.sampling_row import (
    ALL,
    INFINITY,
    LOWEST_KEY,
    load_float,
    load_temperature,
    load_top_k,
    rank_key,
)
from services.engine.kernels.gpu.sampling_search import find_edge, find_edge_in_slots, find_last_id

FACTS = tl.constexpr(3)
"""Words of a row that `floor_kernel` finds; it says which."""


@triton.jit
def _is_filtered(params_ptr, vocab):
    """Whether a filter of a row may leave something out and its draw is random."""
    is_narrow = (load_float(params_ptr, 2) < 1.0) | (load_float(params_ptr, 3) > 0.0)
    return (load_temperature(params_ptr) > 0.0) & (is_narrow | (load_top_k(params_ptr, vocab) > 0))


@triton.jit
def _share_ids(share, SHARES: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr):
    """int32 [SHARE], rising: chunks share, share + SHARES, ..."""
    at = tl.arange(0, SHARE)
    return ((at // CHUNK) * SHARES + share) * CHUNK + at % CHUNK


@triton.jit
def scan_kernel(
    logits_ptr,
    params_ptr,
    maxima_ptr,
    masses_ptr,
    stride_logits_n,
    vocab,
    PARAM_WORDS: tl.constexpr,
    SHARES: tl.constexpr,
    SHARE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (share, row): the largest logit, infinite for NaN, and the mass relative to it."""
    share = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    params_ptr += row * PARAM_WORDS
    if _is_filtered(params_ptr, vocab):
        ids = _share_ids(share, SHARES, SHARE, CHUNK)
        logits = tl.load(logits_ptr + row * stride_logits_n + ids, mask=ids < vocab, other=-INFINITY)
        logits = tl.where(logits < INFINITY, logits, INFINITY)
        largest = tl.max(logits, axis=0)
        mass = tl.full((), 0.0, tl.float32)
        if (largest > -INFINITY) & (largest < INFINITY):
            rate = tl.div_rn(1.0, load_temperature(params_ptr))
            mass = tl.sum(tl.exp((logits - largest) * rate), axis=0)
        tl.store(maxima_ptr + row * SHARES + share, largest)
        tl.store(masses_ptr + row * SHARES + share, mass)


@triton.jit
def _min_p_key(min_p, largest, temperature):
    """The least key whose weight is min_p of the largest weight or more."""
    bound = largest.to(tl.float64) + temperature.to(tl.float64) * tl.log(
        tl.maximum(min_p.to(tl.float64), 1e-300)
    )
    nearest = bound.to(tl.float32)
    return rank_key(nearest) + (nearest.to(tl.float64) < bound).to(tl.int32)


@triton.jit
def floor_kernel(
    params_ptr,
    maxima_ptr,
    masses_ptr,
    facts_ptr,
    row_masses_ptr,
    vocab,
    PARAM_WORDS: tl.constexpr,
    SHARES: tl.constexpr,
    RANKED: tl.constexpr,
):
    """Program (row): from its shares to its facts, FACTS words, and its mass relative to the largest logit.

    Facts: whether anything is filtered; the bits of the largest logit; the floor, a key that no id which is
    kept lies below, and that no id which min_p strikes out reaches.

    The k largest of the shares' maxima are k ids, so the k-th of them is no likelier than the k-th of all. If
    all ids with less than (1 - top_p) / vocab of the mass go, less than 1 - top_p goes.
    """
    row = tl.program_id(0).to(tl.int64)
    params_ptr += row * PARAM_WORDS
    facts_ptr += row * FACTS
    is_filtered = _is_filtered(params_ptr, vocab)
    if is_filtered:
        maxima = tl.load(maxima_ptr + row * SHARES + tl.arange(0, SHARES))
        masses = tl.load(masses_ptr + row * SHARES + tl.arange(0, SHARES))
        largest = tl.max(maxima, axis=0)
        is_filtered = (largest > -INFINITY) & (largest < INFINITY)
        if is_filtered:
            temperature = load_temperature(params_ptr)
            weights = tl.exp((maxima - largest) * tl.div_rn(1.0, temperature))
            mass = tl.sum((masses * weights).to(tl.float64), axis=0)
            top_k = load_top_k(params_ptr, vocab)
            top_p = load_float(params_ptr, 2)
            min_p = load_float(params_ptr, 3)
            floor = _min_p_key(min_p, largest, temperature)
            if (top_k > 0) & (top_k <= SHARES):
                keys = rank_key(maxima)
                ranks = tl.zeros_like(keys)
                for start in range(0, SHARES, RANKED):
                    some = tl.load(maxima_ptr + row * SHARES + start + tl.arange(0, RANKED))
                    ranks += tl.sum((some[None, :] > maxima[:, None]).to(tl.int32), axis=1)
                floor = tl.maximum(floor, tl.min(tl.where(ranks < top_k, keys, ALL), axis=0))
            if (top_k == 0) & (min_p == 0.0):
                least = (1.0 - top_p).to(tl.float64) * mass * (1.0 - 2.0**-10) / vocab
                bound = largest.to(tl.float64) + temperature.to(tl.float64) * tl.log(least)
                floor = tl.maximum(floor, rank_key(bound.to(tl.float32)) - 1)
            tl.store(facts_ptr + 1, largest.to(tl.int32, bitcast=True))
            tl.store(facts_ptr + 2, floor)
            tl.store(row_masses_ptr + row, mass)
    tl.store(facts_ptr, is_filtered.to(tl.int32))


@triton.jit
def collect_kernel(
    logits_ptr,
    facts_ptr,
    counts_ptr,
    keys_ptr,
    stride_logits_n,
    vocab,
    SHARES: tl.constexpr,
    SHARE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Program (share, row): the keys of the share's candidates, as far as there is room, and how many."""
    share = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    facts_ptr += row * FACTS
    if tl.load(facts_ptr) > 0:
        ids = _share_ids(share, SHARES, SHARE, CHUNK)
        logits = tl.load(logits_ptr + row * stride_logits_n + ids, mask=ids < vocab, other=-INFINITY)
        keys = rank_key(logits)
        # Banned ids are no candidates: nothing behind a candidate matters, and they carry no mass.
        is_candidate = (keys >= tl.load(facts_ptr + 2)) & (logits > -INFINITY)
        places = tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
        at = (row * SHARES + share) * ROOM + places
        tl.store(keys_ptr + at, keys, mask=is_candidate & (places < ROOM))
        tl.store(counts_ptr + row * SHARES + share, tl.sum(is_candidate.to(tl.int32), axis=0))


@triton.jit
def select_kernel(
    logits_ptr,
    params_ptr,
    facts_ptr,
    row_masses_ptr,
    counts_ptr,
    keys_ptr,
    bounds_ptr,
    stride_logits_n,
    vocab,
    PARAM_WORDS: tl.constexpr,
    SHARES: tl.constexpr,
    ROOM: tl.constexpr,
    FEW: tl.constexpr,
    LOOP_TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """Program (row): key and id of the last id that is kept; all are where nothing is filtered."""
    at = tl.program_id(0).to(tl.int64)
    params_ptr += at * PARAM_WORDS
    facts_ptr += at * FACTS
    edge = tl.full((), LOWEST_KEY, tl.int32)
    last_id = tl.full((), ALL, tl.int32)
    if tl.load(facts_ptr) > 0:
        largest = tl.load(facts_ptr + 1).to(tl.float32, bitcast=True)
        rate = tl.div_rn(1.0, load_temperature(params_ptr))
        row = (logits_ptr + at * stride_logits_n, vocab, largest, rate)
        top_k = load_top_k(params_ptr, vocab)
        top_p = load_float(params_ptr, 2)
        has_mass = (top_k == 0) & (load_float(params_ptr, 3) == 0.0)
        mass = tl.load(row_masses_ptr + at)
        floor = tl.load(facts_ptr + 2)
        counts_ptr += at * SHARES
        keys_ptr += at * (SHARES * ROOM)
        crowd = tl.max(tl.load(counts_ptr + tl.arange(0, SHARES)), axis=0)
        if crowd <= FEW:
            edge, room, equals = find_edge_in_slots(
                *(counts_ptr, keys_ptr, row, floor, top_k, top_p, mass, has_mass),
                *(SHARES, FEW, ROOM, LOOP_TILE, PIVOTS),
            )
        elif crowd <= ROOM:
            edge, room, equals = find_edge_in_slots(
                *(counts_ptr, keys_ptr, row, floor, top_k, top_p, mass, has_mass),
                *(SHARES, ROOM, ROOM, LOOP_TILE, PIVOTS),
            )
        else:
            edge, room = find_edge((0, 0), row, floor, top_k, top_p, mass, has_mass, False, LOOP_TILE, PIVOTS)
            equals = tl.full((), ALL, tl.int32)
        if room < equals:
            last_id = find_last_id(row, edge, room, LOOP_TILE)
    tl.store(bounds_ptr + 2 * at, edge)
    tl.store(bounds_ptr + 2 * at + 1, last_id)
