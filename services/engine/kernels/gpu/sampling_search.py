"""The search for the last id that top_k and top_p keep: over keys in registers, or over a row where it lies.

Device functions only; they know no launch, nor how candidates were chosen. `row` is everywhere (pointer to
its logits, vocab, the largest logit, 1 / temperature), `entries` the candidates' (keys, weights) if IN_SLOTS,
and a weight is relative to the largest logit's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.sampling_row import ALL, INFINITY, LOWEST_KEY, logit_of, rank_key


@triton.jit
def _tally(entries, row, pivots, BY_MASS: tl.constexpr, IN_SLOTS: tl.constexpr, LOOP_TILE: tl.constexpr):
    """fp32 masses, or int32 counts, of the keys above each of the pivots [P]: [P].

    Over the keys and weights of `entries`, or over the whole row in memory.
    """
    if IN_SLOTS:
        return _tally_tile(entries[0], entries[1], pivots, BY_MASS)
    else:
        totals = tl.zeros_like(pivots).to(tl.float32 if BY_MASS else tl.int32)
        for start in range(0, row[1], LOOP_TILE):
            keys, weights = _load_tile(row, start, LOOP_TILE)
            totals += _tally_tile(keys, weights, pivots, BY_MASS)
        return totals


@triton.jit
def _load_tile(row, start, LOOP_TILE: tl.constexpr):
    """(keys, weights) of LOOP_TILE ids from `start`; an id that is banned or none has the lowest key."""
    logits_ptr, vocab, largest, rate = row
    ids = start + tl.arange(0, LOOP_TILE)
    logits = tl.load(logits_ptr + ids, mask=ids < vocab, other=-INFINITY)
    keys = tl.where(logits > -INFINITY, rank_key(logits), LOWEST_KEY)
    return keys, tl.exp((logits - largest) * rate)


@triton.jit
def _tally_tile(keys, weights, pivots, BY_MASS: tl.constexpr):
    is_above = keys[:, None] > pivots[None, :]
    if BY_MASS:
        return tl.sum(tl.where(is_above, weights[:, None], 0.0), axis=0)
    else:
        return tl.sum(is_above.to(tl.int32), axis=0)


@triton.jit
def _tally_one(entries, row, pivot, BY_MASS: tl.constexpr, IN_SLOTS: tl.constexpr, LOOP_TILE: tl.constexpr):
    """`_tally` of one pivot: a scalar."""
    pivots = tl.full((1,), 0, tl.int32) + pivot
    return tl.max(_tally(entries, row, pivots, BY_MASS, IN_SLOTS, LOOP_TILE), axis=0)


@triton.jit
def _search(
    entries,
    row,
    low,
    high,
    limit,
    BY_MASS: tl.constexpr,
    IN_SLOTS: tl.constexpr,
    LOOP_TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The least key in [low, high] with less than `limit` (fp64) mass, or ids, above it; high has less."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = tl.minimum(low + step * (1 + tl.arange(0, PIVOTS)) - 1, high - 1)
        above = _tally(entries, row, pivots.to(tl.int32), BY_MASS, IN_SLOTS, LOOP_TILE)
        is_low = above.to(tl.float64) >= limit
        # From the last pivot with too much above it, exclusive, to the next one, which has not.
        new_low = tl.max(tl.where(is_low, pivots + 1, low), axis=0)
        high = tl.min(tl.where(is_low, high, pivots), axis=0)
        low = new_low
    return low.to(tl.int32)


@triton.jit
def find_edge(
    entries,
    row,
    low,
    top_k,
    top_p,
    mass,
    has_mass,
    IN_SLOTS: tl.constexpr,
    LOOP_TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """(key of the last id that is kept, how many ids with that key are kept, at most).

    `low` is the row's floor. `mass` (fp64) is that of what min_p and top_k leave if has_mass.
    """
    largest = row[2]
    high = rank_key(largest)
    edge = low
    room = tl.full((), ALL, tl.int32)
    if top_k > 0:
        limit = top_k.to(tl.float64)
        edge = _search(entries, row, low, high, limit, False, IN_SLOTS, LOOP_TILE, PIVOTS)
        room = top_k - _tally_one(entries, row, edge, False, IN_SLOTS, LOOP_TILE)
    if top_p < 1.0:
        if not has_mass:
            equals = _tally_one(entries, row, edge - 1, False, IN_SLOTS, LOOP_TILE)
            equals -= _tally_one(entries, row, edge, False, IN_SLOTS, LOOP_TILE)
            mass = _tally_one(entries, row, edge, True, IN_SLOTS, LOOP_TILE).to(tl.float64)
            mass += tl.minimum(room, equals).to(tl.float64) * _weight_of(edge, row)
        limit = top_p.to(tl.float64) * mass
        found = _search(entries, row, edge, high, limit, True, IN_SLOTS, LOOP_TILE, PIVOTS)
        missing = limit - _tally_one(entries, row, found, True, IN_SLOTS, LOOP_TILE).to(tl.float64)
        some = tl.ceil(tl.minimum(missing / tl.maximum(_weight_of(found, row), 1e-300), 1e9))
        some = tl.maximum(some, 1.0).to(tl.int32)
        room = tl.where(found == edge, tl.minimum(room, some), some)
        edge = found
    return edge, room


@triton.jit
def _weight_of(key, row):
    """fp64, of a logit's key, relative to the row's largest."""
    return tl.exp((logit_of(key) - row[2]) * row[3]).to(tl.float64)


@triton.jit
def find_last_id(row, edge, room, LOOP_TILE: tl.constexpr):
    """The largest id among the first `room` ids whose key is `edge`; every id if there are no more."""
    last_id = tl.full((), ALL, tl.int32)
    before = 0
    for start in range(0, row[1], LOOP_TILE):
        is_equal = (_load_tile(row, start, LOOP_TILE)[0] == edge).to(tl.int32)
        count = tl.sum(is_equal, axis=0)
        if (before < room) & (before + count >= room):
            ids = start + tl.arange(0, LOOP_TILE)
            is_last = (is_equal > 0) & (tl.cumsum(is_equal, axis=0) == room - before)
            last_id = tl.min(tl.where(is_last, ids, ALL), axis=0)
        before += count
    return last_id


@triton.jit
def find_edge_in_slots(
    counts_ptr,
    keys_ptr,
    row,
    low,
    top_k,
    top_p,
    mass,
    has_mass,
    SHARES: tl.constexpr,
    ROOM: tl.constexpr,
    STRIDE: tl.constexpr,
    LOOP_TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """`find_edge` among a row's candidates, no more than ROOM to a share, and how many have the edge's key.

    An empty slot has the lowest key and no weight.
    """
    slots = tl.arange(0, SHARES * ROOM)
    shares = slots // ROOM
    places = slots % ROOM
    is_filled = places < tl.load(counts_ptr + shares)
    keys = tl.load(keys_ptr + shares * STRIDE + places, mask=is_filled, other=LOWEST_KEY)
    entries = (keys, tl.where(is_filled, tl.exp((logit_of(keys) - row[2]) * row[3]), 0.0))
    edge, room = find_edge(entries, row, low, top_k, top_p, mass, has_mass, True, LOOP_TILE, PIVOTS)
    equals = _tally_one(entries, row, edge - 1, False, True, LOOP_TILE)
    equals -= _tally_one(entries, row, edge, False, True, LOOP_TILE)
    return edge, room, equals
