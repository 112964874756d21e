"""min_p, top_k and top_p on the device: which ids of a row are left, found without a sort.

Ids rank by falling logit, equal ones by rising id. Each filter keeps the first so many of that order, so what
all three leave is a prefix of it, told by its last member: a key (the logit's bits as an integer of the same
order) and, among ids with that very key, the largest id. `find_bounds` writes those two for each row.

1. scan: every program takes a share of the row, its largest logit and its mass.
2. collect: from all shares follows a floor below which no id can be kept. What is not below is written out.
3. select: one program holds those candidates in registers and searches the keys for the edge; a row whose
   candidates are more than the room for them is searched where it lies, in many passes.

A share is made of chunks of `_CHUNK` ids from all over the row, because likely ids lie together in real
vocabularies. Knows logits and parameters; draws nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.rounding import is_interpreting

_CHUNK = 32
_SHARE = 1024
_SLOTS = 8192
_LOOP_TILE = 8192
_PIVOTS = 4
_INTERPRETED_PIVOTS = 64
_NUM_WARPS = 4
_SELECT_WARPS = 16
_INFINITY = tl.constexpr(float("inf"))
_LOWEST_KEY = tl.constexpr(-(2**31))
"""Below the key of every logit."""
_ALL = tl.constexpr(2**31 - 1)
_MIN_TEMPERATURE = tl.constexpr(2.0**-120)
"""Temperatures between 0 and this are taken as this, so that reciprocals are finite."""


@triton.jit
def load_temperature(params_ptr):
    """(temperature, whether it is above 0) of a row's params; the temperature is 1 where it is not."""
    temperature = tl.load(params_ptr).to(tl.float32, bitcast=True)
    is_random = temperature > 0
    return tl.where(is_random, tl.maximum(temperature, _MIN_TEMPERATURE), 1.0), is_random


@triton.jit
def rank_key(x):
    """int32 of the same order as fp32 x, which is no NaN; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logit_of(key):
    """fp32 of a `rank_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_filters(params_ptr, vocab):
    """(top_k or 0, top_p, min_p, whether any of them leaves something out) of a row."""
    top_k = tl.load(params_ptr + 1)
    top_k = tl.where((top_k > 0) & (top_k < vocab), top_k, 0)
    top_p = tl.load(params_ptr + 2).to(tl.float32, bitcast=True)
    min_p = tl.load(params_ptr + 3).to(tl.float32, bitcast=True)
    _, is_random = load_temperature(params_ptr)
    return top_k, top_p, min_p, is_random & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def _share_ids(share, SHARES: tl.constexpr, SHARE: tl.constexpr, CHUNK: tl.constexpr):
    """int32 [SHARE], rising: chunks share, share + SHARES, ..."""
    at = tl.arange(0, SHARE)
    return ((at // CHUNK) * SHARES + share) * CHUNK + at % CHUNK


@triton.jit
def _scan_kernel(
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
    _, _, _, is_filtered = _load_filters(params_ptr, vocab)
    if is_filtered:
        ids = _share_ids(share, SHARES, SHARE, CHUNK)
        logits = tl.load(logits_ptr + row * stride_logits_n + ids, mask=ids < vocab, other=-_INFINITY)
        logits = tl.where(logits < _INFINITY, logits, _INFINITY)
        largest = tl.max(logits, axis=0)
        mass = 0.0
        if (largest > -_INFINITY) & (largest < _INFINITY):
            temperature, _ = load_temperature(params_ptr)
            mass = tl.sum(tl.exp((logits - largest) * tl.div_rn(1.0, temperature)), axis=0)
        tl.store(maxima_ptr + row * SHARES + share, largest)
        tl.store(masses_ptr + row * SHARES + share, mass)


@triton.jit
def _load_scan(maxima_ptr, masses_ptr, temperature, SHARES: tl.constexpr):
    """(maxima [SHARES], the row's maximum, its mass relative to that in fp64, whether it can be drawn from)
    of a row.
    """
    shares = tl.arange(0, SHARES)
    maxima = tl.load(maxima_ptr + shares)
    masses = tl.load(masses_ptr + shares)
    largest = tl.max(maxima, axis=0)
    is_sound = (largest > -_INFINITY) & (largest < _INFINITY)
    base = tl.where(is_sound, largest, 0.0)
    weights = tl.exp((maxima - base) * tl.div_rn(1.0, temperature))
    return maxima, base, tl.sum((masses * weights).to(tl.float64), axis=0), is_sound


@triton.jit
def _min_p_key(min_p, largest, temperature):
    """The least key whose weight is min_p of the largest weight or more."""
    bound = largest.to(tl.float64) + temperature.to(tl.float64) * tl.log(
        tl.maximum(min_p.to(tl.float64), 1e-300)
    )
    nearest = bound.to(tl.float32)
    return rank_key(nearest) + (nearest.to(tl.float64) < bound).to(tl.int32)


@triton.jit
def _floor_key(top_k, top_p, min_p, maxima, largest, mass, temperature, vocab, SHARES: tl.constexpr):
    """A key that no id which is kept lies below.

    The k largest of the shares' maxima are k ids, so the k-th of them is no likelier than the k-th of all. If
    all ids with less than (1 - top_p) / vocab of the mass go, less than 1 - top_p goes.
    """
    floor = _min_p_key(min_p, largest, temperature)
    if (top_k > 0) & (top_k <= SHARES):
        keys = rank_key(maxima)
        ranks = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
        floor = tl.maximum(floor, tl.min(tl.where(ranks < top_k, keys, _ALL), axis=0))
    if (top_k == 0) & (min_p == 0.0):
        least = (1.0 - top_p).to(tl.float64) * mass * (1.0 - 2.0**-10) / vocab
        bound = largest.to(tl.float64) + temperature.to(tl.float64) * tl.log(least)
        floor = tl.maximum(floor, rank_key(bound.to(tl.float32)) - 1)
    return floor


@triton.jit
def _collect_kernel(
    logits_ptr,
    params_ptr,
    maxima_ptr,
    masses_ptr,
    counts_ptr,
    keys_ptr,
    ids_ptr,
    stride_logits_n,
    vocab,
    PARAM_WORDS: tl.constexpr,
    SHARES: tl.constexpr,
    SHARE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Program (share, row): the share's candidates, as far as there is room for them, and how many."""
    share = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    params_ptr += row * PARAM_WORDS
    top_k, top_p, min_p, is_filtered = _load_filters(params_ptr, vocab)
    if is_filtered:
        temperature, _ = load_temperature(params_ptr)
        maxima, largest, mass, is_sound = _load_scan(
            maxima_ptr + row * SHARES, masses_ptr + row * SHARES, temperature, SHARES
        )
        if is_sound:
            floor = _floor_key(top_k, top_p, min_p, maxima, largest, mass, temperature, vocab, SHARES)
            ids = _share_ids(share, SHARES, SHARE, CHUNK)
            logits = tl.load(logits_ptr + row * stride_logits_n + ids, mask=ids < vocab, other=-_INFINITY)
            keys = rank_key(logits)
            # Banned ids are no candidates: nothing behind a candidate matters, and they carry no mass.
            is_candidate = (keys >= floor) & (logits > -_INFINITY)
            slots = tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
            at = (row * SHARES + share) * ROOM + slots
            is_stored = is_candidate & (slots < ROOM)
            tl.store(keys_ptr + at, keys, mask=is_stored)
            tl.store(ids_ptr + at, ids, mask=is_stored)
            tl.store(counts_ptr + row * SHARES + share, tl.sum(is_candidate.to(tl.int32), axis=0))


@triton.jit
def _tally(entries, row, pivots, last_id, IN_SLOTS: tl.constexpr, LOOP_TILE: tl.constexpr):
    """([P] counts, [P] masses) of the ids that rank before or at (pivot, last_id), for pivots [P]."""
    if IN_SLOTS:
        keys, ids, weights = entries
        return _tally_tile(keys, ids, weights, pivots, last_id)
    else:
        logits_ptr, vocab, largest, rate = row
        counts = tl.zeros_like(pivots)
        masses = tl.zeros_like(pivots).to(tl.float32)
        for start in range(0, vocab, LOOP_TILE):
            columns = start + tl.arange(0, LOOP_TILE)
            logits = tl.load(logits_ptr + columns, mask=columns < vocab, other=-_INFINITY)
            tile_keys = tl.where(logits > -_INFINITY, rank_key(logits), _LOWEST_KEY)
            weights = tl.exp((logits - largest) * rate)
            some_counts, some_masses = _tally_tile(tile_keys, columns, weights, pivots, last_id)
            counts += some_counts
            masses += some_masses
        return counts, masses


@triton.jit
def _tally_tile(keys, ids, weights, pivots, last_id):
    is_counted = keys[:, None] > pivots[None, :]
    is_counted |= (keys[:, None] == pivots[None, :]) & (ids[:, None] <= last_id)
    counts = tl.sum(is_counted.to(tl.int32), axis=0)
    return counts, tl.sum(tl.where(is_counted, weights[:, None], 0.0), axis=0)


@triton.jit
def _tally_one(entries, row, pivot, last_id, IN_SLOTS: tl.constexpr, LOOP_TILE: tl.constexpr):
    """`_tally` of one pivot: scalars."""
    pivots = tl.full((1,), 0, tl.int32) + pivot
    counts, masses = _tally(entries, row, pivots, last_id, IN_SLOTS, LOOP_TILE)
    return tl.max(counts, axis=0), tl.max(masses, axis=0)


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
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = tl.minimum(low + step * tl.arange(0, PIVOTS), high)
        counts, masses = _tally(entries, row, pivots.to(tl.int32), -1, IN_SLOTS, LOOP_TILE)
        above = masses if BY_MASS else counts
        is_low = above.to(tl.float64) >= limit
        # From the last pivot with too much above it, exclusive, to the next one, which has not.
        new_low = tl.max(tl.where(is_low, pivots + 1, low), axis=0)
        high = tl.min(tl.where(is_low, high, pivots), axis=0)
        low = new_low
    return low.to(tl.int32)


@triton.jit
def _find_edge(
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
    """(key, id) of the last id that is kept.

    `low` is the least key that min_p leaves; mass (fp64) is that of all ids, and is that of those left by
    min_p and top_k if has_mass.
    """
    _, vocab, largest, rate = row
    high = rank_key(largest)
    edge = low
    room = _ALL  # how many ids with the edge's key are kept, at most
    if top_k > 0:
        edge = _search(entries, row, low, high, top_k.to(tl.float64), False, IN_SLOTS, LOOP_TILE, PIVOTS)
        before, _ = _tally_one(entries, row, edge, -1, IN_SLOTS, LOOP_TILE)
        room = top_k - before
    if top_p < 1.0:
        if not has_mass:
            count_before, mass_before = _tally_one(entries, row, edge, -1, IN_SLOTS, LOOP_TILE)
            count, _ = _tally_one(entries, row, edge, _ALL, IN_SLOTS, LOOP_TILE)
            weight = tl.exp((_logit_of(edge) - largest) * rate)
            equals = tl.minimum(room, count - count_before)
            mass = mass_before.to(tl.float64) + equals.to(tl.float64) * weight.to(tl.float64)
        limit = top_p.to(tl.float64) * mass
        found = _search(entries, row, edge, high, limit, True, IN_SLOTS, LOOP_TILE, PIVOTS)
        _, mass_before = _tally_one(entries, row, found, -1, IN_SLOTS, LOOP_TILE)
        weight = tl.exp((_logit_of(found) - largest) * rate).to(tl.float64)
        missing = tl.minimum((limit - mass_before.to(tl.float64)) / tl.maximum(weight, 1e-300), 1e9)
        some = tl.maximum(tl.ceil(missing), 1.0).to(tl.int32)
        room = tl.where(found == edge, tl.minimum(room, some), some)
        edge = found
    before, _ = _tally_one(entries, row, edge, -1, IN_SLOTS, LOOP_TILE)
    count, _ = _tally_one(entries, row, edge, _ALL, IN_SLOTS, LOOP_TILE)
    last_id = _ALL
    if room < count - before:
        low_id = 0
        high_id = vocab - 1
        while low_id < high_id:
            middle = (low_id + high_id) // 2
            count, _ = _tally_one(entries, row, edge, middle, IN_SLOTS, LOOP_TILE)
            is_enough = count - before >= room
            low_id = tl.where(is_enough, low_id, middle + 1)
            high_id = tl.where(is_enough, middle, high_id)
        last_id = low_id
    return edge, last_id


@triton.jit
def _select_kernel(
    logits_ptr,
    params_ptr,
    maxima_ptr,
    masses_ptr,
    counts_ptr,
    keys_ptr,
    ids_ptr,
    bounds_ptr,
    stride_logits_n,
    vocab,
    PARAM_WORDS: tl.constexpr,
    SHARES: tl.constexpr,
    ROOM: tl.constexpr,
    LOOP_TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """Program (row): key and id of the last id that is kept; all are where nothing is filtered."""
    row = tl.program_id(0).to(tl.int64)
    params_ptr += row * PARAM_WORDS
    edge = _LOWEST_KEY
    last_id = _ALL
    top_k, top_p, min_p, is_filtered = _load_filters(params_ptr, vocab)
    if is_filtered:
        temperature, _ = load_temperature(params_ptr)
        _, largest, mass, is_sound = _load_scan(
            maxima_ptr + row * SHARES, masses_ptr + row * SHARES, temperature, SHARES
        )
        if is_sound:
            rate = tl.div_rn(1.0, temperature)
            counts_ptr += row * SHARES
            low = _min_p_key(min_p, largest, temperature)
            has_mass = (top_k == 0) & (min_p == 0.0)
            slots = tl.arange(0, SHARES * ROOM)
            is_filled = slots % ROOM < tl.load(counts_ptr + slots // ROOM)
            at = row * (SHARES * ROOM) + slots
            keys = tl.load(keys_ptr + at, mask=is_filled, other=_LOWEST_KEY)
            ids = tl.load(ids_ptr + at, mask=is_filled, other=_ALL)
            weights = tl.exp((_logit_of(keys) - largest) * rate)
            entries = (keys, ids, tl.where(is_filled, weights, 0.0))
            source = (logits_ptr + row * stride_logits_n, vocab, largest, rate)
            if tl.max(tl.load(counts_ptr + tl.arange(0, SHARES)), axis=0) <= ROOM:
                edge, last_id = _find_edge(
                    entries, source, low, top_k, top_p, mass, has_mass, True, LOOP_TILE, PIVOTS
                )
            else:
                edge, last_id = _find_edge(
                    entries, source, low, top_k, top_p, mass, has_mass, False, LOOP_TILE, PIVOTS
                )
    tl.store(bounds_ptr + 2 * row, edge)
    tl.store(bounds_ptr + 2 * row + 1, last_id)


def find_bounds(logits: Tensor, params: Tensor) -> Tensor:
    """int32 [n, 2]: key (see `rank_key`) and largest id of the last id that is kept, for each row of logits.

    logits: fp32 [n, vocab], n > 0, rows may lie apart. params: int32 [at least n, words], see
    `sampling.draw`.
    Rows that filter nothing, or are drawn from greedily, or cannot be drawn from, keep everything.
    """
    rows, vocab = logits.shape
    shares, share, room = _shape(vocab)
    floats = torch.empty((2, rows, shares), dtype=torch.float32, device=logits.device)
    counts = torch.empty((rows, shares), dtype=torch.int32, device=logits.device)
    slots = torch.empty((2, rows, shares * room), dtype=torch.int32, device=logits.device)
    bounds = torch.empty((rows, 2), dtype=torch.int32, device=logits.device)
    maxima, masses = floats.unbind()
    keys, ids = slots.unbind()
    words = params.shape[1]
    shape = {"PARAM_WORDS": words, "SHARES": shares}
    parts = {"SHARE": share, "CHUNK": _CHUNK, "num_warps": _NUM_WARPS}
    stride = logits.stride(0)
    grid = (shares, rows)
    _scan_kernel[grid](logits, params, maxima, masses, stride, vocab, **shape, **parts)
    _collect_kernel[grid](
        logits, params, maxima, masses, counts, keys, ids, stride, vocab, **shape, **parts, ROOM=room
    )
    _select_kernel[(rows,)](
        logits,
        params,
        maxima,
        masses,
        counts,
        keys,
        ids,
        bounds,
        stride,
        vocab,
        **shape,
        ROOM=room,
        LOOP_TILE=_LOOP_TILE,
        PIVOTS=_INTERPRETED_PIVOTS if is_interpreting() else _PIVOTS,
        num_warps=_SELECT_WARPS,
    )
    return bounds


def _shape(vocab: int) -> tuple[int, int, int]:
    """(shares of a row, ids of a share, candidates there is room for in a share)."""
    shares = triton.next_power_of_2(triton.cdiv(vocab, _SHARE))
    share = max(_CHUNK, min(_SHARE, triton.next_power_of_2(vocab)))
    return shares, share, max(1, min(share, _SLOTS // shares))


def compile_cases() -> list[CompileCase]:
    """The vocabulary of Llama 3, and a larger one."""
    cases = []
    for vocab in (128256, 262144):
        shares, share, room = _shape(vocab)
        pointers = {"logits_ptr": "*fp32", "params_ptr": "*i32", "maxima_ptr": "*fp32", "masses_ptr": "*fp32"}
        lists = {"counts_ptr": "*i32", "keys_ptr": "*i32", "ids_ptr": "*i32"}
        sizes = {"stride_logits_n": "i32", "vocab": "i32"}
        shape = {"PARAM_WORDS": 8, "SHARES": shares}
        parts = {"SHARE": share, "CHUNK": _CHUNK}
        search = {"LOOP_TILE": _LOOP_TILE, "PIVOTS": _PIVOTS}
        for name, kernel, signature, constexprs, num_warps in (
            ("scan", _scan_kernel, {**pointers, **sizes}, {**shape, **parts}, _NUM_WARPS),
            (
                "collect",
                _collect_kernel,
                {**pointers, **lists, **sizes},
                {**shape, **parts, "ROOM": room},
                _NUM_WARPS,
            ),
            (
                "select",
                _select_kernel,
                {**pointers, **lists, "bounds_ptr": "*i32", **sizes},
                {**shape, "ROOM": room, **search},
                _SELECT_WARPS,
            ),
        ):
            cases.append(
                CompileCase(
                    name=f"draw_{name}/vocab{vocab}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=num_warps,
                    num_stages=3,
                )
            )
    return cases
