"""How prefill attention is launched: tile sizes, warps and stages for each shape.

Knows dtypes and sizes known on the host. Does not know the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """One launch configuration.

    Attributes:
        block_m: query vectors in one program: rows times the query heads that share a kv head.
        tile: keys in one pass of the loop.
        num_warps, num_stages: as launched.
    """

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


def choose_config(dtype: torch.dtype, head_dim: int, group: int, max_query_len: int | None) -> PrefillConfig:
    """The configuration for chunks of at most `max_query_len` rows; None asks for the one for all chunks."""
    wanted = 128 if max_query_len is None else max_query_len * group
    if dtype == torch.float32:
        # No tensor cores: registers bound the tile.
        return PrefillConfig(max(16, _power_above(group)), 32, 4, 2)
    if wanted <= 16 and group <= 16:
        return PrefillConfig(16, 64, 4, 3)
    if head_dim > 128:
        return PrefillConfig(128, 64, 8, 2)
    return PrefillConfig(128, 128, 8, 3)


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()
