"""Finds blocks by the tokens that they hold.

Two tables. `full` maps a hash-chain name to the one block that holds those tokens: an exact hit, shared by
adding an owner. `heads` maps (parent, first tokens) to the blocks that begin so, full or not: a hit there
shares only the longest common head, which is copied. Ids are compared on every hit, so a hash collision costs
a miss, not a mix-up. Does not know who owns a block.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from services.engine.core.block import TOKEN_TYPECODE, Block, common_head

MAX_HEADS_SCANNED = 32
"""Blocks of one head bucket that a lookup compares, newest first: bounds the cost of a popular prefix."""


class HeadMatch(NamedTuple):
    """A block that shares its first `num_tokens` tokens with what was looked up."""

    block: Block
    num_tokens: int


class PrefixIndex:
    """The index over every block that holds reusable tokens."""

    def __init__(self, block_size: int, min_head: int) -> None:
        self._block_size = block_size
        self._min_head = min_head
        self._full: dict[bytes, Block] = {}
        self._heads: dict[tuple[bytes, bytes], dict[int, Block]] = {}

    def find_full(self, chain_hash: bytes, token_ids: array[int]) -> Block | None:
        """The block that holds exactly these tokens after exactly that past."""
        block = self._full.get(chain_hash)
        return block if block is not None and block.token_ids == token_ids else None

    def find_head(self, parent_hash: bytes, token_ids: array[int]) -> HeadMatch | None:
        """The block after `parent_hash` with the longest head in common with `token_ids`, if min_head or
        longer.
        """
        if len(token_ids) < self._min_head:
            return None
        bucket = self._heads.get(self._head_key(parent_hash, token_ids))
        if not bucket:
            return None
        best: HeadMatch | None = None
        for _, block in zip(range(MAX_HEADS_SCANNED), reversed(bucket.values()), strict=False):
            length = common_head(block.token_ids, token_ids)
            if length >= self._min_head and (best is None or length > best.num_tokens):
                best = HeadMatch(block, length)
        return best

    def add(self, block: Block) -> None:
        """List a block, or list it better now that it holds more. A second block with equal contents is not
        listed.
        """
        if block.chain_hash is not None:
            listed = self._full.setdefault(block.chain_hash, block)
            if listed is not block:
                self._remove_head(block)
                block.is_indexed = False
                return
        if block.num_filled < self._min_head:
            return
        key = self._head_key(block.parent_hash, block.token_ids)
        self._heads.setdefault(key, {})[block.index] = block
        block.is_indexed = True

    def remove(self, block: Block) -> None:
        """Forget a block."""
        if block.chain_hash is not None and self._full.get(block.chain_hash) is block:
            del self._full[block.chain_hash]
        self._remove_head(block)
        block.is_indexed = False

    def is_covered(self, block: Block) -> bool:
        """Whether another listed block holds all that this partial block holds."""
        bucket = self._heads.get(self._head_key(block.parent_hash, block.token_ids), {})
        others = (other for other in reversed(bucket.values()) if other is not block)
        return any(
            other.token_ids[: block.num_filled] == block.token_ids
            for _, other in zip(range(MAX_HEADS_SCANNED), others, strict=False)
        )

    def blocks(self) -> set[int]:
        """The indices of all listed blocks, for integrity checks."""
        listed = {block.index for bucket in self._heads.values() for block in bucket.values()}
        return listed | {block.index for block in self._full.values()}

    def _head_key(self, parent_hash: bytes, token_ids: array[int]) -> tuple[bytes, bytes]:
        return parent_hash, array(TOKEN_TYPECODE, token_ids[: self._min_head]).tobytes()

    def _remove_head(self, block: Block) -> None:
        if block.num_filled < self._min_head:
            return
        key = self._head_key(block.parent_hash, block.token_ids)
        bucket = self._heads.get(key)
        if bucket is not None:
            bucket.pop(block.index, None)
            if not bucket:
                del self._heads[key]
