"""How prefill attention is launched: tile sizes, warps and stages for each shape.

Knows dtypes, sizes known on the host and the device's shared memory. Does not know the kernel. Chosen by what
the machine code says (registers without spills, shared memory, instructions for a tile), not by timing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

MAX_HEAD_DIM = 256
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
"""Bytes for one program, by architecture: sm_100 has what sm_90 has, sm_89 and sm_120 what sm_86 has."""


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


# By the largest head_dim: 128 query vectors fill two warp groups, which multiply straight from shared memory.
_WIDE = {
    64: PrefillConfig(128, 64, 8, 3),
    128: PrefillConfig(128, 128, 8, 3),
    256: PrefillConfig(128, 32, 8, 3),
}
# As on sm_80, where operands pass through registers.
_WIDE_163_KIB = {
    64: PrefillConfig(128, 64, 8, 3),
    128: PrefillConfig(128, 64, 8, 3),
    256: PrefillConfig(64, 32, 8, 3),
}
# As on sm_86: one tile on its way while one is worked on.
_WIDE_99_KIB = {
    64: PrefillConfig(128, 64, 8, 3),
    128: PrefillConfig(128, 64, 8, 2),
    256: PrefillConfig(64, 32, 8, 2),
}
# 16 or 32 query vectors: as many bytes of K and V, little to multiply.
_NARROW = {128: PrefillConfig(16, 64, 4, 3), 256: PrefillConfig(16, 32, 4, 3)}
_NARROW_ROWS = (16, 32)


def choose_config(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    max_query_len: int | None,
    block_size: int,
    *,
    shared_memory: int,
) -> PrefillConfig:
    """The configuration for chunks of at most `max_query_len` rows; None asks for the one for all chunks.
    `shared_memory`: bytes of it that the device has for one program.

    Neither `block_size` nor the stages it chooses change a bit of the result. Raises ValueError for heads
    longer than MAX_HEAD_DIM.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is at most {MAX_HEAD_DIM}, found {head_dim}")
    if dtype == torch.float32:
        # No tensor cores: registers bound the tile.
        config = PrefillConfig(max(16, _power_above(group)), 32, 4, 2)
    else:
        config = _wide(head_dim, shared_memory)
        vectors = config.block_m if max_query_len is None else max_query_len * group
        for block_m in _NARROW_ROWS:
            if vectors <= block_m:
                config = replace(_by_head_dim(_NARROW, head_dim), block_m=block_m)
                break
    if block_size < config.tile:
        # The numbers of the blocks that a tile spans are fetched through the pipeline too, ahead of what lies
        # in them, and the compiler gives each of the two loads half of the stages.
        config = replace(config, num_stages=2 * config.num_stages - 1)
    return config


def _wide(head_dim: int, shared_memory: int) -> PrefillConfig:
    if shared_memory >= SHARED_MEMORY[90]:
        return _by_head_dim(_WIDE, head_dim)
    return _by_head_dim(_WIDE_163_KIB if shared_memory >= SHARED_MEMORY[80] else _WIDE_99_KIB, head_dim)


def _by_head_dim(table: dict[int, PrefillConfig], head_dim: int) -> PrefillConfig:
    return table[min(limit for limit in table if head_dim <= limit)]


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()
