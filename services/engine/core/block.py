"""One block of the KV cache, and the hash chain that names its contents.

Knows token ids and counts; K and V themselves are the runner's.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

TOKEN_TYPECODE = "I"
"""Token ids are kept as unsigned 32-bit integers."""


class BlockState(enum.Enum):
    """Who a block belongs to. Free + Active + Cached is always the number of blocks."""

    FREE = "free"
    ACTIVE = "active"
    CACHED = "cached"


@dataclass(slots=True, eq=False)
class Block:
    """`block_size` token slots of K and V in all layers.

    `token_ids` are the tokens whose K and V it holds, from its first slot on. `num_owners` counts the
    sequences that have it in their table, plus the copies under way that read it. `parent_hash` names
    everything before the block; `chain_hash` names everything through its end and is set once the block is
    full. While Cached, `cached_at` orders it by age, and until `retained_until`, in seconds of the core's
    clock, it is evicted after others. `older` and `newer` are its neighbours among the blocks that the prefix
    index lists under the same head.
    """

    index: int
    state: BlockState = BlockState.FREE
    num_owners: int = 0
    token_ids: array[int] = field(default_factory=lambda: array(TOKEN_TYPECODE))
    parent_hash: bytes = b""
    chain_hash: bytes | None = None
    is_indexed: bool = False
    cached_at: int = 0
    retained_until: float = 0.0
    older: Block | None = None
    newer: Block | None = None

    @property
    def num_filled(self) -> int:
        """How many leading slots hold the K and V of known tokens."""
        return len(self.token_ids)


class BlockCounts(NamedTuple):
    """How many blocks are in each state."""

    free: int
    active: int
    cached: int


@dataclass(slots=True)
class Match:
    """What the cache holds of a sequence's head.

    `blocks` are full blocks to share. After them, `head` may share its first `num_head_tokens`: by taking the
    block over when `is_takeover`, else by a copy into a fresh block.
    """

    blocks: list[Block] = field(default_factory=list)
    head: Block | None = None
    num_head_tokens: int = 0
    is_takeover: bool = False

    def num_tokens(self, block_size: int) -> int:
        """Tokens that need not be computed."""
        return len(self.blocks) * block_size + self.num_head_tokens


def root_hash(namespace: str, salt: str) -> bytes:
    """The parent of every first block: differs by artifact and by cache salt."""
    digest = blake2b(digest_size=16)
    for part in (namespace.encode(), salt.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def chain_hash(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """The name of a full block: a hash over its parent's name and its own token ids."""
    return blake2b(parent + array(TOKEN_TYPECODE, token_ids).tobytes(), digest_size=16).digest()


def common_head(left: array[int], right: array[int]) -> int:
    """How many leading tokens two token arrays share. O(log n) slice compares: equal heads are the usual
    case.
    """
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
