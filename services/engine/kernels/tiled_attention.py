"""Paged attention of the CPU backend: absolute 128-key tiles, sums in tile order, whole ragged batch at once.

A row's bits depend on its own keys and nothing else: every product is [query tile rows, head_dim] x
[head_dim, 128], every tile begins at a multiple of 128 positions whatever the block size, the maximum is
exact in any order, and the tiles' sums are added from the first to the last. Decodes of many sequences share
one batched matmul (ordered tile by tile, so that no sequence pays for a longer one); longer chunks run one
sequence at a time with the keys gathered once.

Memory that a sequence does not own may hold anything, NaN included: scores of such keys are masked, and their
values are replaced by zeros, because 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from services.engine.kernels.attention_plan import ChunkPlan, DecodeGroup, first_visible, make_plan
from services.engine.kernels.kv_format import KVFormat, LayerCache, dequantize
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import KEY_TILE, Numerics
from services.engine.kernels.reference import cap_scores
from services.engine.kernels.scratch import Scratch

_CHUNK_ROWS = 512
"""(query, head) rows of one slab of a prefill chunk: bounds the scores held at once to rows x context."""


def paged_attention(
    query: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    numerics: Numerics,
    scratch: Scratch,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `reference.paged_attention`, with the guarantee above. Computes in fp32 whatever the dtypes."""
    _, heads, head_dim = query.shape
    kv_heads = cache.num_kv_heads
    plan_name = f"tiles-{sliding_window}"
    plan = metadata.plan.get(plan_name)
    if plan is None:
        plan = make_plan(metadata, kv_heads, head_dim, sliding_window)
        metadata.plan[plan_name] = plan
    keys = _Parts("keys", cache.k, cache.k_params, cache.kv_format, scratch)
    values = _Parts("values", cache.v, cache.v_params, cache.kv_format, scratch)
    wide = query.float() * scale
    out = torch.zeros_like(wide)
    for group in plan.decodes:
        rows = wide.index_select(0, group.rows).view(-1, kv_heads, heads // kv_heads, head_dim)
        out.index_copy_(
            0,
            group.rows,
            _decode(rows, keys, values, group, numerics.query_tile, softcap).reshape(-1, heads, head_dim),
        )
    for chunk in plan.chunks:
        span = slice(chunk.start, chunk.start + chunk.length)
        _prefill(
            wide[span],
            out[span],
            keys,
            values,
            metadata.positions[span],
            chunk,
            kv_heads,
            numerics.query_tile,
            sliding_window,
            softcap,
        )
    return out.to(query.dtype)


class _Parts:
    """K or V of one layer as rows of min(block_size, 128) slots, gathered to fp32 into a scratch buffer.

    What is quantised is dequantised element by element, so that an element's bits depend on nothing beside
    its own vector.
    """

    def __init__(
        self, name: str, stored: Tensor, params: Tensor | None, kv_format: KVFormat, scratch: Scratch
    ) -> None:
        part = min(stored.shape[2], KEY_TILE)
        self._name, self._format, self._scratch = name, kv_format, scratch
        self._stored = stored.view(-1, part, stored.shape[-1])
        self._params = None if params is None else params.view(-1, part)

    def gather(self, units: Tensor) -> Tensor:
        """The parts [n] as [n, part, head_dim]; valid until the same name is gathered again."""
        shape = (units.shape[0], *self._stored.shape[1:])
        gathered = self._scratch.take(self._name, shape, self._stored.dtype)
        torch.index_select(self._stored, 0, units, out=gathered)
        if gathered.dtype == torch.float32:
            return gathered
        shape = (*shape[:2], shape[2] * self._format.values_per_unit)
        wide = self._scratch.take(self._name, shape, torch.float32)
        if self._params is None:
            return wide.copy_(gathered)
        return dequantize(gathered, self._params.index_select(0, units), self._format, out=wide)


def _decode(
    query: Tensor,
    keys: _Parts,
    values: _Parts,
    group: DecodeGroup,
    query_tile: int,
    softcap: float | None,
) -> Tensor:
    """Attention of one row per sequence: query [sequences, kv_heads, heads per kv head, head_dim] and
    back.
    """
    num_seqs, kv_heads, num_heads, head_dim = query.shape
    tile_rows = -(-num_heads // query_tile) * query_tile
    padded = query.new_zeros(num_seqs, kv_heads, tile_rows, head_dim)
    padded[:, :, :num_heads] = query
    num_pairs = group.ranks.shape[0]
    left = padded.index_select(0, group.ranks).view(-1, tile_rows, head_dim)
    key_tiles = keys.gather(group.units).view(-1, KEY_TILE, head_dim)
    scores = torch.bmm(left, key_tiles.transpose(1, 2)).view(num_pairs, kv_heads, tile_rows, KEY_TILE)
    if softcap is not None:
        scores = cap_scores(scores, softcap)
    _bits(scores).bitwise_and_(group.keep)
    scores.add_(group.bias)
    tile_max = scores.amax(-1)
    row_max = tile_max[:num_seqs].clone()
    for first, count in _later_tiles(group.counts):
        torch.maximum(row_max[:count], tile_max[first : first + count], out=row_max[:count])
    weights = scores.sub_(row_max.index_select(0, group.ranks).unsqueeze(-1)).exp_()
    value_tiles = values.gather(group.units).view(num_pairs, kv_heads, KEY_TILE, head_dim)
    if group.partial.numel():
        tails = value_tiles.index_select(0, group.partial)
        _bits(tails).bitwise_and_(group.keep_values)
        value_tiles.index_copy_(0, group.partial, tails)
    partial = torch.bmm(weights.view(-1, tile_rows, KEY_TILE), value_tiles.view(-1, KEY_TILE, head_dim))
    partial = partial.view(num_pairs, kv_heads, tile_rows, head_dim)
    tile_sum = weights.sum(-1)
    numerator, denominator = partial[:num_seqs], tile_sum[:num_seqs]
    for first, count in _later_tiles(group.counts):
        numerator[:count] += partial[first : first + count]
        denominator[:count] += tile_sum[first : first + count]
    return (numerator / denominator.unsqueeze(-1))[:, :, :num_heads]


def _bits(x: Tensor) -> Tensor:
    """An fp32 tensor's bits: an AND with no bits makes 0.0 of anything, NaN included, and fast."""
    return x.view(torch.int32)


def _later_tiles(counts: list[int]) -> Iterator[tuple[int, int]]:
    """(first pair, number of pairs) of tiles 1, 2, ..."""
    first = counts[0]
    for count in counts[1:]:
        yield first, count
        first += count


def _prefill(
    query: Tensor,
    out: Tensor,
    keys: _Parts,
    values: _Parts,
    positions: Tensor,
    chunk: ChunkPlan,
    kv_heads: int,
    query_tile: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attention of one sequence's chunk: query [length, heads, head_dim] -> out, in slabs of rows."""
    length, heads, head_dim = query.shape
    per_head = heads // kv_heads
    shape = (kv_heads, chunk.num_tiles, KEY_TILE, head_dim)
    key_tiles = keys.gather(chunk.units).view(shape)
    value_tiles = values.gather(chunk.units).view(shape)
    outside = chunk.context - (chunk.first_tile + chunk.num_tiles - 1) * KEY_TILE
    value_tiles[:, -1, outside:] = 0.0
    step = max(1, _CHUNK_ROWS // per_head)
    for first in range(0, length, step):
        last = min(first + step, length)
        rows = query[first:last].view(-1, kv_heads, per_head, head_dim).permute(1, 0, 2, 3).flatten(1, 2)
        row_positions = positions[first:last].repeat_interleave(per_head)
        result = _slab(
            rows, key_tiles, value_tiles, row_positions, chunk.first_tile, query_tile, window, softcap
        )
        result = result.view(kv_heads, last - first, per_head, head_dim).permute(1, 0, 2, 3)
        out[first:last] = result.reshape(last - first, heads, head_dim)


def _slab(
    rows: Tensor,
    key_tiles: Tensor,
    value_tiles: Tensor,
    positions: Tensor,
    first_tile: int,
    query_tile: int,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of rows [kv_heads, n, head_dim] at ascending `positions` over tiles [kv_heads, tiles, 128,
    head_dim] that begin with the sequence's tile `first_tile`.

    Tiles before the window of the lowest row are skipped. Those before another row's only add zeros to its
    sums, so that its bits are the same as when they are skipped.
    """
    kv_heads, num_rows, head_dim = rows.shape
    padded_rows = -(-num_rows // query_tile) * query_tile
    padded = rows.new_zeros(kv_heads, padded_rows, head_dim)
    padded[:, :num_rows] = rows
    limits = positions.new_full((padded_rows,), int(positions[-1]))
    limits[:num_rows] = positions
    lowest, highest = int(positions[0]), int(positions[-1])
    begin = first_visible(lowest, window) // KEY_TILE - first_tile
    num_tiles = highest // KEY_TILE + 1 - first_tile - begin
    key_tiles, value_tiles = key_tiles[:, begin:], value_tiles[:, begin:]
    scores = rows.new_empty(num_tiles, kv_heads, padded_rows, KEY_TILE)
    for tile in range(num_tiles):
        torch.bmm(padded, key_tiles[:, tile].transpose(1, 2), out=scores[tile])
        if softcap is not None:
            cap_scores(scores[tile], softcap)
        first = (first_tile + begin + tile) * KEY_TILE
        if first + KEY_TILE - 1 > lowest or first < first_visible(highest, window):
            distance = limits[:, None] - torch.arange(first, first + KEY_TILE)[None, :]
            is_hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            scores[tile].masked_fill_(is_hidden, float("-inf"))
    weights = scores.sub_(scores.amax((0, 3)).unsqueeze(-1)).exp_()
    sums = weights.sum(-1)
    numerator = torch.bmm(weights[0], value_tiles[:, 0])
    denominator = sums[0]
    for tile in range(1, num_tiles):
        numerator += torch.bmm(weights[tile], value_tiles[:, tile])
        denominator += sums[tile]
    return (numerator / denominator.unsqueeze(-1))[:, :num_rows]
