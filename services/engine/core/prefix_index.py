"""Finds blocks by the tokens that they hold.

Two tables. `full` maps a hash-chain name to the one block that holds those tokens: an exact hit, shared by
adding an owner. `heads` maps (parent, first tokens) to the newest block that begins so, full or not; the
others hang on it, from newer to older. A hit there shares only the longest common head, which is copied. Ids
are compared on every hit, so a hash collision costs a miss, not a mix-up. Does not know who owns a block.

Nothing is made for a block that is listed but its keys, which are bytes: the garbage collector has nothing to
look through, however many blocks there are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from services.engine.core.block import Block, common_head
from services.engine.core.errors import IntegrityError

MAX_HEADS_SCANNED = 32
"""Blocks of one head that a lookup compares, newest first: bounds the cost of a popular prefix."""


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
        self._heads: dict[bytes, Block] = {}

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
        best: HeadMatch | None = None
        for block in self._newest(self._head_key(parent_hash, token_ids)):
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
                self._unlink(block)
                return
        if block.is_indexed or block.num_filled < self._min_head:
            return
        key = self._head_key(block.parent_hash, block.token_ids)
        older = self._heads.get(key)
        if older is not None:
            older.newer = block
        block.older = older
        self._heads[key] = block
        block.is_indexed = True

    def remove(self, block: Block) -> None:
        """Forget a block."""
        if block.chain_hash is not None and self._full.get(block.chain_hash) is block:
            del self._full[block.chain_hash]
        self._unlink(block)

    def is_covered(self, block: Block) -> bool:
        """Whether another listed block holds all that this partial block holds."""
        return any(
            other is not block and other.token_ids[: block.num_filled] == block.token_ids
            for other in self._newest(self._head_key(block.parent_hash, block.token_ids))
        )

    def blocks(self) -> set[int]:
        """The indices of all listed blocks. Raises IntegrityError when neighbours do not know each other."""
        listed = {block.index for block in self._full.values()}
        for newest in self._heads.values():
            newer: Block | None = None
            block: Block | None = newest
            while block is not None:
                if block.newer is not newer:
                    raise IntegrityError(f"block {block.index} is listed beside another neighbour")
                listed.add(block.index)
                newer, block = block, block.older
        return listed

    def _newest(self, key: bytes) -> Iterator[Block]:
        """The blocks of one head, newest first, but not more than are worth comparing."""
        block = self._heads.get(key)
        for _ in range(MAX_HEADS_SCANNED):
            if block is None:
                return
            yield block
            block = block.older

    def _head_key(self, parent_hash: bytes, token_ids: array[int]) -> bytes:
        return parent_hash + token_ids[: self._min_head].tobytes()

    def _unlink(self, block: Block) -> None:
        """Take a block from among those of its head."""
        if not block.is_indexed:
            return
        newer, older = block.newer, block.older
        if older is not None:
            older.newer = newer
        if newer is not None:
            newer.older = older
        else:
            key = self._head_key(block.parent_hash, block.token_ids)
            if older is not None:
                self._heads[key] = older
            else:
                del self._heads[key]
        block.newer = block.older = None
        block.is_indexed = False
