"""min_p, top_k and top_p on the device: which ids of a row are left, found without a sort.

Ids rank by falling logit, equal ones by rising id. Each filter keeps the first so many of that order, so what
all three leave is a prefix of it, told by its last member: a key (the logit's bits as an integer of the same
order) and, among ids with that very key, the largest id. `find_bounds` writes those two for each row.

1. scan: every program finds the largest logit and the mass of its share of the row.
2. floor: from all shares follows a key below which no id can be kept.
3. collect: what is not below is written out.
4. select: one program holds those candidates in registers and searches the keys for the edge; a row whose
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
_LOOP_TILE = 4096
_FEW = 4
_RANKED = 16
_PIVOTS = 2
_INTERPRETED_PIVOTS = 64
_NUM_WARPS = 4
_SELECT_WARPS = 16
_INFINITY = tl.constexpr(float("inf"))
_LOWEST_KEY = tl.constexpr(-(2**31))
"""Below the key of every logit."""
_ALL = tl.constexpr(2**31 - 1)
_FACTS = tl.constexpr(3)
_MIN_TEMPERATURE = tl.constexpr(2.0**-120)
"""Temperatures between 0 and this are taken as this, so that reciprocals are finite."""


@triton.jit
def load_temperature(params_ptr):
    """fp32 temperature of a row's params; 0 for a greedy row."""
    temperature = tl.load(params_ptr).to(tl.float32, bitcast=True)
    return tl.where(temperature > 0, tl.maximum(temperature, _MIN_TEMPERATURE), 0.0)


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
def _load_top_k(params_ptr, vocab):
    top_k = tl.load(params_ptr + 1)
    return tl.where((top_k > 0) & (top_k < vocab), top_k, 0)


@triton.jit
def _load_float(params_ptr, word: tl.constexpr):
    return tl.load(params_ptr + word).to(tl.float32, bitcast=True)


@triton.jit
def _is_filtered(params_ptr, vocab):
    """Whether a filter of a row may leave something out and its draw is random."""
    is_narrow = (_load_float(params_ptr, 2) < 1.0) | (_load_float(params_ptr, 3) > 0.0)
    return (load_temperature(params_ptr) > 0.0) & (is_narrow | (_load_top_k(params_ptr, vocab) > 0))


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
    if _is_filtered(params_ptr, vocab):
        ids = _share_ids(share, SHARES, SHARE, CHUNK)
        logits = tl.load(logits_ptr + row * stride_logits_n + ids, mask=ids < vocab, other=-_INFINITY)
        logits = tl.where(logits < _INFINITY, logits, _INFINITY)
        largest = tl.max(logits, axis=0)
        mass = tl.full((), 0.0, tl.float32)
        if (largest > -_INFINITY) & (largest < _INFINITY):
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
def _floor_kernel(
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
    """Program (row): from its shares to its facts, _FACTS words, and its mass relative to the largest logit.

    Facts: whether anything is filtered; the bits of the largest logit; the floor, a key that no id which is
    kept lies below, and that no id which min_p strikes out reaches.

    The k largest of the shares' maxima are k ids, so the k-th of them is no likelier than the k-th of all. If
    all ids with less than (1 - top_p) / vocab of the mass go, less than 1 - top_p goes.
    """
    row = tl.program_id(0).to(tl.int64)
    params_ptr += row * PARAM_WORDS
    facts_ptr += row * _FACTS
    is_filtered = _is_filtered(params_ptr, vocab)
    if is_filtered:
        maxima = tl.load(maxima_ptr + row * SHARES + tl.arange(0, SHARES))
        masses = tl.load(masses_ptr + row * SHARES + tl.arange(0, SHARES))
        largest = tl.max(maxima, axis=0)
        is_filtered = (largest > -_INFINITY) & (largest < _INFINITY)
        if is_filtered:
            temperature = load_temperature(params_ptr)
            weights = tl.exp((maxima - largest) * tl.div_rn(1.0, temperature))
            mass = tl.sum((masses * weights).to(tl.float64), axis=0)
            top_k = _load_top_k(params_ptr, vocab)
            top_p = _load_float(params_ptr, 2)
            min_p = _load_float(params_ptr, 3)
            floor = _min_p_key(min_p, largest, temperature)
            if (top_k > 0) & (top_k <= SHARES):
                keys = rank_key(maxima)
                ranks = tl.zeros_like(keys)
                for start in range(0, SHARES, RANKED):
                    some = tl.load(maxima_ptr + row * SHARES + start + tl.arange(0, RANKED))
                    ranks += tl.sum((some[None, :] > maxima[:, None]).to(tl.int32), axis=1)
                floor = tl.maximum(floor, tl.min(tl.where(ranks < top_k, keys, _ALL), axis=0))
            if (top_k == 0) & (min_p == 0.0):
                least = (1.0 - top_p).to(tl.float64) * mass * (1.0 - 2.0**-10) / vocab
                bound = largest.to(tl.float64) + temperature.to(tl.float64) * tl.log(least)
                floor = tl.maximum(floor, rank_key(bound.to(tl.float32)) - 1)
            tl.store(facts_ptr + 1, largest.to(tl.int32, bitcast=True))
            tl.store(facts_ptr + 2, floor)
            tl.store(row_masses_ptr + row, mass)
    tl.store(facts_ptr, is_filtered.to(tl.int32))


@triton.jit
def _collect_kernel(
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
    facts_ptr += row * _FACTS
    if tl.load(facts_ptr) > 0:
        ids = _share_ids(share, SHARES, SHARE, CHUNK)
        logits = tl.load(logits_ptr + row * stride_logits_n + ids, mask=ids < vocab, other=-_INFINITY)
        keys = rank_key(logits)
        # Banned ids are no candidates: nothing behind a candidate matters, and they carry no mass.
        is_candidate = (keys >= tl.load(facts_ptr + 2)) & (logits > -_INFINITY)
        places = tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
        at = (row * SHARES + share) * ROOM + places
        tl.store(keys_ptr + at, keys, mask=is_candidate & (places < ROOM))
        tl.store(counts_ptr + row * SHARES + share, tl.sum(is_candidate.to(tl.int32), axis=0))


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
    logits = tl.load(logits_ptr + ids, mask=ids < vocab, other=-_INFINITY)
    keys = tl.where(logits > -_INFINITY, rank_key(logits), _LOWEST_KEY)
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
    """(key of the last id that is kept, how many ids with that key are kept, at most).

    `low` is the row's floor. `mass` (fp64) is that of what min_p and top_k leave if has_mass.
    """
    largest = row[2]
    high = rank_key(largest)
    edge = low
    room = tl.full((), _ALL, tl.int32)
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
    return tl.exp((_logit_of(key) - row[2]) * row[3]).to(tl.float64)


@triton.jit
def _last_id(row, edge, room, LOOP_TILE: tl.constexpr):
    """The largest id among the first `room` ids whose key is `edge`; every id if there are no more."""
    last_id = tl.full((), _ALL, tl.int32)
    before = 0
    for start in range(0, row[1], LOOP_TILE):
        is_equal = (_load_tile(row, start, LOOP_TILE)[0] == edge).to(tl.int32)
        count = tl.sum(is_equal, axis=0)
        if (before < room) & (before + count >= room):
            ids = start + tl.arange(0, LOOP_TILE)
            is_last = (is_equal > 0) & (tl.cumsum(is_equal, axis=0) == room - before)
            last_id = tl.min(tl.where(is_last, ids, _ALL), axis=0)
        before += count
    return last_id


@triton.jit
def _find_edge_in_slots(
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
    """`_find_edge` among a row's candidates, no more than ROOM to a share, and how many have the edge's key.

    An empty slot has the lowest key and no weight.
    """
    slots = tl.arange(0, SHARES * ROOM)
    shares = slots // ROOM
    places = slots % ROOM
    is_filled = places < tl.load(counts_ptr + shares)
    keys = tl.load(keys_ptr + shares * STRIDE + places, mask=is_filled, other=_LOWEST_KEY)
    entries = (keys, tl.where(is_filled, tl.exp((_logit_of(keys) - row[2]) * row[3]), 0.0))
    edge, room = _find_edge(entries, row, low, top_k, top_p, mass, has_mass, True, LOOP_TILE, PIVOTS)
    equals = _tally_one(entries, row, edge - 1, False, True, LOOP_TILE)
    equals -= _tally_one(entries, row, edge, False, True, LOOP_TILE)
    return edge, room, equals


@triton.jit
def _select_kernel(
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
    facts_ptr += at * _FACTS
    edge = tl.full((), _LOWEST_KEY, tl.int32)
    last_id = tl.full((), _ALL, tl.int32)
    if tl.load(facts_ptr) > 0:
        largest = tl.load(facts_ptr + 1).to(tl.float32, bitcast=True)
        rate = tl.div_rn(1.0, load_temperature(params_ptr))
        row = (logits_ptr + at * stride_logits_n, vocab, largest, rate)
        top_k = _load_top_k(params_ptr, vocab)
        top_p = _load_float(params_ptr, 2)
        has_mass = (top_k == 0) & (_load_float(params_ptr, 3) == 0.0)
        mass = tl.load(row_masses_ptr + at)
        floor = tl.load(facts_ptr + 2)
        counts_ptr += at * SHARES
        keys_ptr += at * (SHARES * ROOM)
        crowd = tl.max(tl.load(counts_ptr + tl.arange(0, SHARES)), axis=0)
        if crowd <= FEW:
            edge, room, equals = _find_edge_in_slots(
                *(counts_ptr, keys_ptr, row, floor, top_k, top_p, mass, has_mass),
                *(SHARES, FEW, ROOM, LOOP_TILE, PIVOTS),
            )
        elif crowd <= ROOM:
            edge, room, equals = _find_edge_in_slots(
                *(counts_ptr, keys_ptr, row, floor, top_k, top_p, mass, has_mass),
                *(SHARES, ROOM, ROOM, LOOP_TILE, PIVOTS),
            )
        else:
            edge, room = _find_edge(
                (0, 0), row, floor, top_k, top_p, mass, has_mass, False, LOOP_TILE, PIVOTS
            )
            equals = tl.full((), _ALL, tl.int32)
        if room < equals:
            last_id = _last_id(row, edge, room, LOOP_TILE)
    tl.store(bounds_ptr + 2 * at, edge)
    tl.store(bounds_ptr + 2 * at + 1, last_id)


def find_bounds(logits: Tensor, params: Tensor) -> Tensor:
    """int32 [n, 2]: key (see `rank_key`) and largest id of the last id that is kept, for each row of logits.

    logits: fp32 [n, vocab], n > 0, rows may lie apart. params: int32 [at least n, words], see
    `sampling.draw`. Rows that filter nothing, or are greedy, or cannot be drawn from, keep everything.
    """
    rows, vocab = logits.shape
    shares, share, room = _shape(vocab)
    device = logits.device
    maxima = torch.empty((rows, shares), dtype=torch.float32, device=device)
    masses = torch.empty_like(maxima)
    row_masses = torch.empty((rows,), dtype=torch.float64, device=device)
    facts = torch.empty((rows, _FACTS.value), dtype=torch.int32, device=device)
    counts = torch.empty((rows, shares), dtype=torch.int32, device=device)
    keys = torch.empty((rows, shares * room), dtype=torch.int32, device=device)
    bounds = torch.empty((rows, 2), dtype=torch.int32, device=device)
    stride = logits.stride(0)
    grid = (shares, rows)
    words = {"PARAM_WORDS": params.shape[1], "SHARES": shares}
    parts = {"SHARES": shares, "SHARE": share, "CHUNK": _CHUNK, "num_warps": _NUM_WARPS}
    _scan_kernel[grid](logits, params, maxima, masses, stride, vocab, PARAM_WORDS=params.shape[1], **parts)
    _floor_kernel[(rows,)](
        *(params, maxima, masses, facts, row_masses, vocab),
        **words,
        RANKED=min(shares, _RANKED),
        num_warps=_NUM_WARPS,
    )
    _collect_kernel[grid](logits, facts, counts, keys, stride, vocab, **parts, ROOM=room)
    _select_kernel[(rows,)](
        logits,
        params,
        facts,
        row_masses,
        counts,
        keys,
        bounds,
        stride,
        vocab,
        **words,
        ROOM=room,
        FEW=max(1, room // _FEW),
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
    return [case for vocab in (128256, 262144) for case in _cases(vocab)]


def _cases(vocab: int) -> list[CompileCase]:
    shares, share, room = _shape(vocab)
    words = {"PARAM_WORDS": 8, "SHARES": shares}
    parts = {"SHARES": shares, "SHARE": share, "CHUNK": _CHUNK}
    search = {"ROOM": room, "FEW": max(1, room // _FEW), "LOOP_TILE": _LOOP_TILE, "PIVOTS": _PIVOTS}
    scan = ["logits_ptr", "params_ptr", "maxima_ptr", "masses_ptr", "stride_logits_n", "vocab"]
    floor = ["params_ptr", "maxima_ptr", "masses_ptr", "facts_ptr", "row_masses_ptr", "vocab"]
    collect = ["logits_ptr", "facts_ptr", "counts_ptr", "keys_ptr", "stride_logits_n", "vocab"]
    select = ["logits_ptr", "params_ptr", "facts_ptr", "row_masses_ptr", "counts_ptr", "keys_ptr"]
    select += ["bounds_ptr", "stride_logits_n", "vocab"]
    types = dict.fromkeys(("logits_ptr", "maxima_ptr", "masses_ptr"), "*fp32")
    types |= {"row_masses_ptr": "*fp64", "stride_logits_n": "i32", "vocab": "i32"}
    return [
        CompileCase(
            name=f"draw_{name}/vocab{vocab}",
            kernel=kernel,
            signature={argument: types.get(argument, "*i32") for argument in arguments},
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=3,
        )
        for name, kernel, arguments, constexprs, num_warps in (
            ("scan", _scan_kernel, scan, {"PARAM_WORDS": 8, **parts}, _NUM_WARPS),
            ("floor", _floor_kernel, floor, {**words, "RANKED": min(shares, _RANKED)}, _NUM_WARPS),
            ("collect", _collect_kernel, collect, {**parts, "ROOM": room}, _NUM_WARPS),
            ("select", _select_kernel, select, {**words, **search}, _SELECT_WARPS),
        )
    ]
