"""How the tiled attention of the CPU backend cuts a ragged batch: which rows share a matmul, and where tiles
lie.

Made once per step from `AttentionMetadata`, used by all layers. Knows block tables and lengths; touches no K
or V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import KEY_TILE

GATHER_BUDGET = 1 << 19
"""Elements of K gathered at once for decodes: past the caches of a core, more in one go gains nothing."""


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one row each, longest first, as (key tile, sequence) pairs in tile order.

    rows: batch row of each sequence. ranks: which sequence (in this order) each pair belongs to. units: rows
    of the cache viewed as [-1, tile part, head_dim]. keep int32 and bias fp32 [pairs, 1, 1, 128]: all bits
    and 0 for keys of the context, no bits and -inf for others. partial: the pairs that have others,
    keep_values [partial, 1, 128, 1] their bits. counts: how many sequences reach tile 0, 1, ...
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
    """One sequence with several rows: batch rows, positions, gather indices of all its key tiles [heads *
    tiles].
    """

    start: int
    length: int
    num_tiles: int
    context: int
    units: Tensor


@dataclass(slots=True)
class TilePlan:
    """All decodes in groups, all longer chunks one by one."""

    decodes: list[DecodeGroup]
    chunks: list[ChunkPlan]


def make_plan(metadata: AttentionMetadata, kv_heads: int, head_dim: int) -> TilePlan:
    """Cut one batch: single rows into groups of at most GATHER_BUDGET elements of K, the rest by sequence."""
    starts = metadata.query_starts
    decodes: list[int] = []
    chunks: list[ChunkPlan] = []
    for index, length in enumerate(metadata.query_lens):
        if length == 1:
            decodes.append(index)
            continue
        context = metadata.context_lens[index]
        num_tiles = -(-context // KEY_TILE)
        table = metadata.block_tables[index : index + 1]
        tiles = torch.arange(num_tiles)
        units = _units(table.expand(num_tiles, -1), tiles, metadata.block_size, kv_heads)
        by_head = units.view(num_tiles, kv_heads, -1).transpose(0, 1).flatten()
        chunks.append(ChunkPlan(starts[index], length, num_tiles, context, by_head))
    decodes.sort(key=lambda index: -metadata.context_lens[index])
    budget = max(1, GATHER_BUDGET // (kv_heads * KEY_TILE * head_dim))
    groups = [_decode_group(metadata, members, kv_heads) for members in _slabs(decodes, metadata, budget)]
    return TilePlan(groups, chunks)


def _slabs(decodes: list[int], metadata: AttentionMetadata, budget: int) -> Iterator[list[int]]:
    """Cut the sequences, longest first, into groups of at most `budget` key tiles (or of one sequence)."""
    members: list[int] = []
    used = 0
    for index in decodes:
        tiles = -(-metadata.context_lens[index] // KEY_TILE)
        if members and used + tiles > budget:
            yield members
            members, used = [], 0
        members.append(index)
        used += tiles
    if members:
        yield members


def _decode_group(metadata: AttentionMetadata, members: list[int], kv_heads: int) -> DecodeGroup:
    starts = metadata.query_starts
    contexts = torch.tensor([metadata.context_lens[index] for index in members])
    num_tiles = -(-contexts // KEY_TILE)
    longest = int(num_tiles[0])
    # nonzero of [tiles, sequences] runs tile by tile, which is the order of the pairs.
    pairs = (torch.arange(longest)[:, None] < num_tiles[None, :]).nonzero()
    tiles, ranks = pairs[:, 0], pairs[:, 1]
    tables = metadata.block_tables[torch.tensor(members)][ranks]
    limits = contexts[ranks] - tiles * KEY_TILE
    is_inside = torch.arange(KEY_TILE)[None, :] < limits[:, None]
    keep = torch.where(is_inside, -1, 0).to(torch.int32)
    bias = torch.where(is_inside, 0.0, float("-inf"))[:, None, None, :]
    counts = torch.bincount(tiles, minlength=longest).tolist()
    rows = torch.tensor([starts[index] for index in members])
    units = _units(tables, tiles, metadata.block_size, kv_heads)
    partial = (limits < KEY_TILE).nonzero().flatten()
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
