"""The integers of one step on a device: one buffer, filled by one copy, seen through typed views.

A step needs token ids, positions, slots, block tables and a few more arrays, some hundred bytes each. Copied
one by one they would cost more than a layer; here they lie side by side, at places that depend on the step's
shape alone, so that a CUDA graph captured for a shape finds them again at every replay. In front lie the
tokens drawn last, which never leave the device: a decode whose token the host has not seen takes it from
there.

Knows chunks and block tables. Does not know the model, nor what a graph is.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.engine.core.batch import Chunk

_INT64 = ("token_ids", "input_index", "positions", "slot_mapping", "logits_rows")
_ALIGNMENT = 16
"""Triton compiles a kernel anew for a pointer that is not a multiple of it."""


def _width(name: str) -> int:
    return 8 if name in _INT64 else 4


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a captured step depends on. `num_rows`, `num_seqs` and `num_logits` may count padding;
    `table_width` blocks bound every context; `max_query_len` bounds every sequence's rows.
    """

    num_rows: int
    num_seqs: int
    num_logits: int
    table_width: int
    max_query_len: int

    def sizes(self) -> dict[str, int]:
        """Elements of every array, in the order in which they lie."""
        return {
            "token_ids": self.num_rows,
            "input_index": self.num_rows,
            "positions": self.num_rows,
            "slot_mapping": self.num_rows,
            "logits_rows": self.num_logits,
            "query_starts": self.num_seqs + 1,
            "context_lens": self.num_seqs,
            "block_tables": self.num_seqs * self.table_width,
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, each begun at a multiple of `_ALIGNMENT`."""
        return sum(_aligned(size * _width(name)) for name, size in self.sizes().items())


@dataclass(slots=True)
class StepInputs:
    """Views of one step's arrays: on the device, or of the host memory they are copied from."""

    token_ids: Any
    input_index: Any
    positions: Any
    slot_mapping: Any
    logits_rows: Any
    query_starts: Any
    context_lens: Any
    block_tables: Any


def split(buffer: Any, shape: StepShape, int64: Any, int32: Any) -> StepInputs:
    """The arrays of `shape` within a byte buffer (a tensor or a numpy array) aligned to 16."""
    views, begin = [], 0
    for name, size in shape.sizes().items():
        num_bytes = size * _width(name)
        views.append(buffer[begin : begin + num_bytes].view(int64 if name in _INT64 else int32))
        begin += _aligned(num_bytes)
    inputs = StepInputs(*views)
    inputs.block_tables = inputs.block_tables.reshape(shape.num_seqs, shape.table_width)
    return inputs


class StepBuffers:
    """The device side: drawn tokens in front, then one step's arrays. Sized for the largest step."""

    def __init__(self, largest: StepShape, device: torch.device) -> None:
        self.largest = largest
        self.num_drawn = _aligned(8 * max(largest.num_logits, 1)) // 8
        self._data = torch.zeros(8 * self.num_drawn + largest.num_bytes, dtype=torch.uint8, device=device)
        self._is_pinned = device.type == "cuda"
        self.drawn: Tensor = self._data[: 8 * self.num_drawn].view(torch.int64)

    def views(self, shape: StepShape) -> StepInputs:
        """The arrays of a step of this shape. `token_ids` includes the drawn tokens in front."""
        inputs = split(self._data[8 * self.num_drawn :], shape, torch.int64, torch.int32)
        inputs.token_ids = self._data[: 8 * (self.num_drawn + shape.num_rows)].view(torch.int64)
        return inputs

    def stage(self, shape: StepShape) -> tuple[Tensor, StepInputs]:
        """(host bytes, numpy views of them) to fill and hand to `send`. Fresh memory: an earlier copy may
        still be on its way.
        """
        host = torch.empty(shape.num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        return host, split(host.numpy(), shape, np.int64, np.int32)

    def send(self, host: Tensor) -> None:
        """Copy staged bytes to the device, in stream order, without waiting."""
        begin = 8 * self.num_drawn
        self._data[begin : begin + host.numel()].copy_(host, non_blocking=True)


def shape_of(chunks: SequenceABC[Chunk], block_size: int) -> StepShape:
    """The exact shape of a batch."""
    longest = max(chunk.start + chunk.length for chunk in chunks)
    return StepShape(
        num_rows=sum(chunk.length for chunk in chunks),
        num_seqs=len(chunks),
        num_logits=sum(chunk.is_sampling for chunk in chunks),
        table_width=-(-longest // block_size),
        max_query_len=max(chunk.length for chunk in chunks),
    )


def fill(
    inputs: StepInputs, chunks: SequenceABC[Chunk], block_size: int, scratch_block: int, num_drawn: int
) -> None:
    """Write a batch into staged arrays. Rows, sequences and logits beyond the batch's own are padding: they
    write to the scratch block and read nothing.
    """
    starts = np.array([chunk.start for chunk in chunks])
    lengths = np.array([chunk.length for chunk in chunks])
    ends = np.cumsum(lengths)
    num_rows = int(ends[-1])
    _fill_tables(inputs.block_tables, chunks, starts + lengths, block_size)
    owners = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(num_rows) - np.repeat(ends - lengths - starts, lengths)
    inputs.positions[:num_rows] = positions
    inputs.positions[num_rows:] = 0
    block, offset = np.divmod(positions, block_size)
    inputs.slot_mapping[:num_rows] = inputs.block_tables[owners, block] * np.int64(block_size) + offset
    inputs.slot_mapping[num_rows:] = scratch_block * block_size
    inputs.query_starts[0] = 0
    inputs.query_starts[1 : len(chunks) + 1] = ends
    inputs.query_starts[len(chunks) + 1 :] = num_rows
    inputs.context_lens[: len(chunks)] = starts + lengths
    inputs.context_lens[len(chunks) :] = 0
    rows = ends[[chunk.is_sampling for chunk in chunks]] - 1
    inputs.logits_rows[: len(rows)] = rows
    inputs.logits_rows[len(rows) :] = 0
    _fill_tokens(inputs, chunks, num_rows, num_drawn)


def _fill_tables(
    tables: np.ndarray, chunks: SequenceABC[Chunk], contexts: np.ndarray, block_size: int
) -> None:
    """Each sequence's blocks, as many as its context reaches; what follows holds no keys."""
    tables[:] = 0
    for row, (chunk, context) in enumerate(zip(chunks, contexts.tolist(), strict=True)):
        used = -(-context // block_size)
        tables[row, :used] = chunk.sequence.block_table[:used]


def _fill_tokens(inputs: StepInputs, chunks: SequenceABC[Chunk], num_rows: int, num_drawn: int) -> None:
    """Token ids the host knows, and where each row takes its own from: they lie behind the drawn ones."""
    token_ids: list[int] = []
    drawn_rows, draws = [], []
    for chunk in chunks:
        # A last token that is still on the device is not in the list yet.
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.start + chunk.length]
        if chunk.input_row is not None:
            drawn_rows.append(len(token_ids))
            draws.append(chunk.input_row)
            token_ids.append(0)
    inputs.token_ids[:num_rows] = token_ids
    inputs.token_ids[num_rows:] = 0
    inputs.input_index[:] = np.arange(num_drawn, num_drawn + len(inputs.input_index))
    inputs.input_index[drawn_rows] = draws
