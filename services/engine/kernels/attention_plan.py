"""How the tiled attention of the CPU backend cuts a ragged batch: which rows share a matmul, and where tiles
lie.

Made once per step from `AttentionMetadata`, used by all layers with the same window. Knows block tables and
lengths; touches no K or V. Tiles that no row of a sequence sees are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import KEY_TILE

GATHER_BUDGET = 1 << 19
"""Elements of K gathered at once for decodes: past the caches of a core, more in one go gains nothing."""


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one row each, most visible tiles first, as (key tile, sequence) pairs: the first tile
    that each sequence sees, then the second of those that have one, and so on.

    rows: batch row of each sequence. ranks: which sequence (in this order) each pair belongs to. units: rows
    of the cache viewed as [-1, tile part, row_size]. keep int32 and bias fp32 [pairs, 1, 1, 128]: all bits
    and 0 for keys that the row sees, no bits and -inf for others. partial: the pairs that have others,
    keep_values [partial, 1, 128, 1] their bits. counts: how many sequences see a first, second, ... tile.
    """

    rows: Tensor
    ranks: Tensor
    units: Tensor
    keep: Tensor
    bias: Tensor
    partial: Tensor
    keep_values: Tensor
    counts: list[int]


@dataclass(slots=True)
class ChunkPlan:
    """One sequence with several rows: batch rows, and gather indices [heads * tiles] of the key tiles from
    `first_tile` on that its rows see.
    """

    start: int
    length: int
    first_tile: int
    num_tiles: int
    context: int
    units: Tensor


@dataclass(slots=True)
class TilePlan:
    """All decodes in groups, all longer chunks one by one."""

    decodes: list[DecodeGroup]
    chunks: list[ChunkPlan]


def first_visible(position: int, window: int | None) -> int:
    """The first position that the row at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def make_plan(
    metadata: AttentionMetadata, kv_heads: int, head_dim: int, window: int | None = None
) -> TilePlan:
    """Cut one batch: single rows into groups of at most GATHER_BUDGET elements of K, the rest by sequence."""
    starts = metadata.query_starts
    decodes: list[_Decode] = []
    chunks: list[ChunkPlan] = []
    for index, length in enumerate(metadata.query_lens):
        context = metadata.context_lens[index]
        lowest = first_visible(context - length, window)
        first_tile = lowest // KEY_TILE
        num_tiles = -(-context // KEY_TILE) - first_tile
        if length == 1:
            decodes.append(_Decode(index, context, lowest, first_tile, num_tiles))
            continue
        table = metadata.block_tables[index : index + 1]
        tiles = torch.arange(first_tile, first_tile + num_tiles)
        units = _units(table.expand(num_tiles, -1), tiles, metadata.block_size, kv_heads)
        by_head = units.view(num_tiles, kv_heads, -1).transpose(0, 1).flatten()
        chunks.append(ChunkPlan(starts[index], length, first_tile, num_tiles, context, by_head))
    decodes.sort(key=lambda decode: -decode.num_tiles)
    budget = max(1, GATHER_BUDGET // (kv_heads * KEY_TILE * head_dim))
    groups = [_decode_group(metadata, members, kv_heads) for members in _slabs(decodes, budget)]
    return TilePlan(groups, chunks)


class _Decode(NamedTuple):
    """A sequence with one row, which sees the keys `lowest` .. context - 1, in `num_tiles` tiles."""

    index: int
    context: int
    lowest: int
    first_tile: int
    num_tiles: int


def _slabs(decodes: list[_Decode], budget: int) -> Iterator[list[_Decode]]:
    """Cut the sequences, in order, into groups of at most `budget` key tiles (or of one sequence)."""
    members: list[_Decode] = []
    used = 0
    for decode in decodes:
        if members and used + decode.num_tiles > budget:
            yield members
            members, used = [], 0
        members.append(decode)
        used += decode.num_tiles
    if members:
        yield members


def _decode_group(metadata: AttentionMetadata, members: list[_Decode], kv_heads: int) -> DecodeGroup:
    starts = metadata.query_starts
    indices, contexts, lowest, first_tiles, num_tiles = torch.tensor(members).unbind(1)
    # nonzero of [tiles, sequences] runs tile by tile, which is the order of the pairs.
    pairs = (torch.arange(members[0].num_tiles)[:, None] < num_tiles[None, :]).nonzero()
    nth, ranks = pairs.unbind(1)
    tiles = first_tiles[ranks] + nth
    tables = metadata.block_tables[indices][ranks]
    positions = tiles[:, None] * KEY_TILE + torch.arange(KEY_TILE)[None, :]
    is_inside = (positions >= lowest[ranks, None]) & (positions < contexts[ranks, None])
    keep = torch.where(is_inside, -1, 0).to(torch.int32)
    bias = torch.where(is_inside, 0.0, float("-inf"))[:, None, None, :]
    counts = torch.bincount(nth).tolist()
    rows = torch.tensor([starts[decode.index] for decode in members])
    units = _units(tables, tiles, metadata.block_size, kv_heads)
    partial = (~is_inside).any(-1).nonzero().flatten()
    keep_values = keep[partial][:, None, :, None]
    return DecodeGroup(rows, ranks, units, keep[:, None, None, :], bias, partial, keep_values, counts)


def _units(tables: Tensor, tiles: Tensor, block_size: int, kv_heads: int) -> Tensor:
    """Where key tile tiles[i] of the sequence with block table tables[i] lies: int64 [pairs * heads * parts].

    The cache is viewed as rows of min(block_size, 128) slots. Parts of a tile past the table repeat its last
    entry: their keys are outside of the context and masked.
    """
    heads = torch.arange(kv_heads)
    if block_size >= KEY_TILE:
        per_block = block_size // KEY_TILE
        blocks = tables.gather(1, (tiles // per_block)[:, None])
        units = (blocks * kv_heads + heads[None, :]) * per_block + (tiles % per_block)[:, None]
        return units.flatten()
    parts = KEY_TILE // block_size
    wanted = tiles[:, None] * parts + torch.arange(parts)[None, :]
    blocks = tables.gather(1, wanted.clamp_(max=tables.shape[1] - 1))
    return (blocks[:, None, :] * kv_heads + heads[None, :, None]).flatten()
