"""The shape of one ragged batch, as attention and the KV write see it.

Knows positions, slots and block tables. Does not know tokens, sequences, requests or who owns a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """One mixed batch of decodes and prefill chunks, rows packed one sequence after the other.

    Attributes:
        positions: int64 [rows], the absolute position of each row in its sequence (0 for padding rows).
        slot_mapping: int64 [rows], block * block_size + offset where the row's K and V go.
        block_tables: int64 [num_seqs, max_blocks]; entries past a sequence's last block hold no keys.
        query_lens: rows of each sequence, on the host.
        context_lens: tokens of each sequence once this batch is written, on the host.
        block_size: token slots per block.
        num_padding_rows: rows at the end that belong to no sequence; their slots lie in the scratch block.
        plan: what a backend derives from the rest, once per step, for all layers.
    """

    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_lens: list[int]
    context_lens: list[int]
    block_size: int
    num_padding_rows: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    _query_starts: list[int] | None = None
    _cache_rows: Tensor | None = None

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return len(self.query_lens)

    @property
    def query_starts(self) -> list[int]:
        """First row of each sequence, and the number of real rows at the end."""
        if self._query_starts is None:
            self._query_starts = list(accumulate(self.query_lens, initial=0))
        return self._query_starts

    def cache_rows(self, num_kv_heads: int) -> Tensor:
        """int64 [rows * kv_heads]: where each row's heads go in a cache viewed as [..., head_dim] rows."""
        if self._cache_rows is None:
            block = torch.div(self.slot_mapping, self.block_size, rounding_mode="floor")
            offset = self.slot_mapping - block * self.block_size
            heads = torch.arange(num_kv_heads, device=self.slot_mapping.device)
            rows = (block[:, None] * num_kv_heads + heads[None, :]) * self.block_size + offset[:, None]
            self._cache_rows = rows.flatten()
        return self._cache_rows
