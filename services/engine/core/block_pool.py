"""The life of a block: Free, Active while anybody owns it, Cached after that if it can be found again.

Knows which tokens blocks hold only through the prefix index; knows no sequences.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from time import monotonic

from services.engine.core.batch import BlockCopy
from services.engine.core.block import TOKEN_TYPECODE, Block, BlockCounts, BlockState
from services.engine.core.errors import IntegrityError
from services.engine.core.eviction import EvictionOrder
from services.engine.core.prefix_index import PrefixIndex


class BlockPool:
    """All blocks, each in one state. `now` is a monotonic clock in seconds; at most half of the pool is
    retained.
    """

    def __init__(self, num_blocks: int, index: PrefixIndex, now: Callable[[], float] = monotonic) -> None:
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.cached = EvictionOrder(num_blocks // 2, now)
        self._free = deque(self.blocks)
        self._index = index
        self._held: Counter[int] = Counter()

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: Free, or Cached and evictable."""
        return len(self._free) + len(self.cached)

    def counts(self) -> BlockCounts:
        """Blocks by state."""
        free, cached = len(self._free), len(self.cached)
        return BlockCounts(free, len(self.blocks) - free - cached, cached)

    def take(self) -> Block:
        """An empty block with one owner. Raises KeyError when none is available."""
        if self._free:
            block = self._free.popleft()
        else:
            block = self.cached.evict()
            self._index.remove(block)
            self._wipe(block)
        block.state = BlockState.ACTIVE
        block.num_owners = 1
        return block

    def own(self, block: Block) -> None:
        """One owner more for a block that holds tokens."""
        if block.state is BlockState.CACHED:
            self.cached.remove(block)
            block.state = BlockState.ACTIVE
        elif block.state is BlockState.FREE:
            raise IntegrityError(f"block {block.index} is free and cannot be shared")
        block.num_owners += 1

    def disown(self, block: Block) -> None:
        """One owner less. After the last one a block that can be found becomes Cached, unless another holds
        all that it does.
        """
        block.num_owners -= 1
        if block.num_owners < 0:
            raise IntegrityError(f"block {block.index} was given back too often")
        if block.num_owners:
            return
        is_partial = block.chain_hash is None
        if block.is_indexed and not (is_partial and self._index.is_covered(block)):
            block.state = BlockState.CACHED
            self.cached.add(block)
            return
        if block.is_indexed:
            self._index.remove(block)
        self._wipe(block)
        block.state = BlockState.FREE
        self._free.append(block)

    def hold(self, block: Block) -> None:
        """Keep the source of a copy until `finish_copy`."""
        self.own(block)
        self._held[block.index] += 1

    def finish_copy(self, copy: BlockCopy) -> None:
        """The step with this copy has run, or will not run: its source may go."""
        self._held[copy.source] -= 1
        if not self._held[copy.source]:
            del self._held[copy.source]
        self.disown(self.blocks[copy.source])

    def is_shared(self, block: Block) -> bool:
        """Whether several sequences own a block. A copy does not count: it reads a head that is written."""
        return block.num_owners > 1 and block.num_owners - self._held[block.index] > 1

    def check_integrity(self, owners: Counter[int]) -> None:
        """Recount everything, from how many sequences own each block. Raises IntegrityError on the first
        difference.
        """
        owners = owners + self._held
        free = {block.index for block in self._free}
        if len(free) != len(self._free):
            raise IntegrityError("a block is twice in the free list")
        listed = self._index.blocks()
        cached = set(self.cached.checked())
        for block in self.blocks:
            in_lists = (block.index in free, block.index in cached)
            expected = (block.state is BlockState.FREE, block.state is BlockState.CACHED)
            if in_lists != expected:
                raise IntegrityError(f"block {block.index} is {block.state} but listed otherwise")
            if block.num_owners != owners[block.index]:
                raise IntegrityError(
                    f"block {block.index} has {block.num_owners} owners, counted {owners[block.index]}"
                )
            if (block.num_owners > 0) != (block.state is BlockState.ACTIVE):
                raise IntegrityError(f"block {block.index} is {block.state} with {block.num_owners} owners")
            if block.state is BlockState.CACHED and not (block.is_indexed and block.num_filled):
                raise IntegrityError(f"block {block.index} is cached but cannot be found")
            if block.is_indexed != (block.index in listed):
                raise IntegrityError(f"block {block.index} and the index disagree")
        if sum(self.counts()) != len(self.blocks):
            raise IntegrityError("free + active + cached is not the number of blocks")

    @staticmethod
    def _wipe(block: Block) -> None:
        block.token_ids = array(TOKEN_TYPECODE)
        block.parent_hash = b""
        block.chain_hash = None
        block.retained_until = 0.0


def owners_of(block_tables: Iterable[Iterable[int]]) -> Counter[int]:
    """How many tables each block is in."""
    return Counter(index for table in block_tables for index in table)
