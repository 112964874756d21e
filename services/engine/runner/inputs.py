"""From the core's chunks to tensors: token ids, positions, slots, block tables, and which rows give logits.

Knows sequences only through their token ids and block tables. Does not know the model.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from services.engine.core.batch import Chunk
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import CPU


class InputError(ValueError):
    """A chunk cannot be computed as it stands."""


@dataclass(slots=True)
class ModelInputs:
    """One step's tensors. `num_logits` real rows come first in `logits_rows`; the rest repeats row 0 as
    padding.
    """

    token_ids: Tensor
    metadata: AttentionMetadata
    logits_rows: Tensor
    num_logits: int


def check_chunk(chunk: Chunk, block_size: int, num_blocks: int, vocab_size: int, max_model_len: int) -> None:
    """Refuse what would read or write outside of the cache, the tables or the embedding. Raises
    InputError.
    """
    sequence, end = chunk.sequence, chunk.start + chunk.length
    if chunk.start < 0 or chunk.length < 1 or end > len(sequence.token_ids):
        raise InputError(f"chunk [{chunk.start}, {end}) of a sequence of {len(sequence.token_ids)} tokens")
    if end > max_model_len:
        raise InputError(f"position {end - 1} is beyond the model's {max_model_len} positions")
    if len(sequence.block_table) * block_size < end:
        raise InputError(f"{len(sequence.block_table)} blocks of {block_size} do not hold {end} tokens")
    used = sequence.block_table[: -(-end // block_size)]
    if min(used) < 0 or max(used) >= num_blocks:
        raise InputError(f"block table {min(used)}..{max(used)} outside of the cache's {num_blocks} blocks")
    ids = sequence.token_ids[chunk.start : end]
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise InputError(f"token id outside of the vocabulary of {vocab_size}")


def make_inputs(
    chunks: SequenceABC[Chunk],
    block_size: int,
    scratch_block: int,
    row_tile: int,
    device: torch.device = CPU,
) -> ModelInputs:
    """Pack the chunks row after row, then padding rows up to a multiple of `row_tile`, which write to the
    scratch block.
    """
    lengths = [chunk.length for chunk in chunks]
    num_rows = sum(lengths)
    num_padding = -num_rows % row_tile
    ids = list(chain.from_iterable(c.sequence.token_ids[c.start : c.start + c.length] for c in chunks))
    contexts = [chunk.start + chunk.length for chunk in chunks]
    tables = _block_tables(chunks, contexts, block_size)
    if all(length == 1 for length in lengths):
        positions = torch.tensor([chunk.start for chunk in chunks] + [0] * num_padding)
        owners = torch.arange(num_rows)
    else:
        spans = [torch.arange(chunk.start, chunk.start + chunk.length) for chunk in chunks]
        positions = torch.cat([*spans, torch.zeros(num_padding, dtype=torch.int64)])
        owners = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(lengths))
    real = positions[:num_rows]
    slots = torch.full((num_rows + num_padding,), scratch_block * block_size)
    slots[:num_rows] = tables[owners, real // block_size] * block_size + real % block_size
    slots[num_rows:] += torch.arange(num_padding) % block_size
    rows, num_logits = _logits_rows(chunks, row_tile)
    token_ids = torch.tensor(ids + [0] * num_padding)
    token_ids, positions, slots, tables, rows = (
        tensor.to(device) for tensor in (token_ids, positions, slots, tables, rows)
    )
    metadata = AttentionMetadata(positions, slots, tables, lengths, contexts, block_size, num_padding)
    return ModelInputs(token_ids, metadata, rows, num_logits)


def _block_tables(chunks: SequenceABC[Chunk], contexts: list[int], block_size: int) -> Tensor:
    """int64 [chunks, longest]; short tables are filled up with their own last block."""
    used = [
        chunk.sequence.block_table[: -(-end // block_size)]
        for chunk, end in zip(chunks, contexts, strict=True)
    ]
    longest = max(map(len, used))
    return torch.tensor([table + [table[-1]] * (longest - len(table)) for table in used])


def _logits_rows(chunks: SequenceABC[Chunk], row_tile: int) -> tuple[Tensor, int]:
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.length
        if chunk.is_sampling:
            rows.append(end - 1)
    return torch.tensor(rows + [0] * (-len(rows) % row_tile), dtype=torch.int64), len(rows)
