"""The shape of one ragged batch as the attention kernels take it: lengths on the device, bounds on the host.

Made once per step, for all layers. A runner that keeps these arrays in persistent buffers, so that a CUDA
graph finds them again, puts its own into the metadata's plan; else it is derived from what the host knows.
Knows lengths and block tables. Does not know sequences, nor the kernels that read it; imports no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.kernels.metadata import AttentionMetadata

PLAN_KEY = "gpu"
"""Where it lies in `AttentionMetadata.plan`."""


@dataclass(frozen=True, slots=True)
class GpuMetadata:
    """What one launch of attention needs.

    Attributes:
        query_starts: int32 [num_seqs + 1], the first row of each sequence, and the end of the last one's.
        context_lens: int32 [num_seqs], tokens of each sequence once this batch is written; 0 is padding.
        block_tables: int32 [num_seqs, max_blocks]; entries past a sequence's last block hold no keys.
        max_query_len: no sequence has more rows.
        max_context: no sequence has more tokens. Grids are sized by these two bounds.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_context: int

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has at most one row: row i is then sequence i."""
        return self.max_query_len == 1


def gpu_metadata(metadata: AttentionMetadata) -> GpuMetadata:
    """The metadata's own, made and kept on the first call of a step unless the runner has put it there."""
    plan = metadata.plan.get(PLAN_KEY)
    if plan is None:
        plan = metadata.plan[PLAN_KEY] = _derive(metadata)
    return plan


def _derive(metadata: AttentionMetadata) -> GpuMetadata:
    device = metadata.slot_mapping.device
    starts, contexts = metadata.query_starts, metadata.context_lens
    # One copy to the device instead of two. Both begin at a multiple of 16 bytes, because Triton compiles a
    # kernel anew for a pointer that does not.
    gap = -len(starts) % 4
    lengths = torch.tensor([*starts, *[0] * gap, *contexts], dtype=torch.int32).to(device)
    return GpuMetadata(
        query_starts=lengths[: len(starts)],
        context_lens=lengths[len(starts) + gap :],
        block_tables=metadata.block_tables.to(device, torch.int32).contiguous(),
        max_query_len=max(metadata.query_lens, default=0),
        max_context=max(contexts, default=0),
    )
