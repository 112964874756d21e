"""Who owns which block of the KV cache.

Five verbs: `match` finds what is cached, `allocate` takes it, `reserve` gets room for more tokens, `record`
writes down what has been computed, `release` gives everything back. Knows no tensors, no scheduling, no
requests.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from time import monotonic

from services.engine.core.batch import BlockCopy
from services.engine.core.block import (
    TOKEN_TYPECODE,
    Block,
    BlockCounts,
    BlockState,
    Match,
    chain_hash,
    root_hash,
)
from services.engine.core.errors import IntegrityError
from services.engine.core.eviction import EvictionOrder
from services.engine.core.prefix_index import PrefixIndex
from services.engine.core.sequence import Sequence

DEFAULT_MIN_HEAD = 4
"""Shortest common head worth a copy, in tokens: measured on a CPU, where 4 tokens cost 29 copies."""


class BlockManager:
    """The pool of blocks.

    `namespace` salts the hash chain (the artifact digest): equal tokens under another model never hit.
    `min_head` is the shortest common head worth a copy, in tokens. With `has_prefix_cache` off nothing is
    ever Cached. `now` is a monotonic clock in seconds; at most half of the pool is retained.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        namespace: str = "",
        min_head: int | None = None,
        has_prefix_cache: bool = True,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.min_head = min(block_size, min_head or DEFAULT_MIN_HEAD)
        self.has_prefix_cache = has_prefix_cache
        self._namespace = namespace
        self._blocks = [Block(index) for index in range(num_blocks)]
        self._free = deque(self._blocks)
        self._cached = EvictionOrder(num_blocks // 2, now)
        self._index = PrefixIndex(block_size, self.min_head)
        self._held: Counter[int] = Counter()

    # -- the five verbs ------------------------------------------------------------

    def match(self, sequence: Sequence) -> Match:
        """The longest cached head of a sequence, always leaving its last token to be computed.

        Finds what has been recorded.
        """
        match = Match()
        if not self.has_prefix_cache:
            return match
        limit = len(sequence) - 1
        size = self.block_size
        parent = self._root(sequence)
        for i in range(limit // size):
            name = self._block_hash(sequence, i)
            block = self._index.find_full(name, _tokens(sequence, i * size, (i + 1) * size))
            if block is None:
                break
            match.blocks.append(block)
            parent = name
        start = len(match.blocks) * size
        found = self._index.find_head(parent, _tokens(sequence, start, min(start + size, limit)))
        if found is not None:
            block, match.num_head_tokens = found
            match.head = block
            match.is_takeover = (
                block.state is BlockState.CACHED and block.num_filled == found.num_tokens < size
            )
        return match

    def blocks_to_find(self, match: Match, num_tokens: int) -> int:
        """Free or evictable blocks that `allocate` and then `reserve(num_tokens)` would use up."""
        needed = -(-num_tokens // self.block_size) - len(match.blocks)
        revived = sum(block.state is BlockState.CACHED for block in match.blocks)
        if match.head is not None and match.head.state is BlockState.CACHED:
            revived += not match.is_takeover
        return needed + revived

    def allocate(self, sequence: Sequence, match: Match) -> BlockCopy | None:
        """Give a match to a sequence without blocks. A returned copy must run before the sequence's next
        forward, and `finish_copy` must follow it. The caller has checked `num_available`.
        """
        if sequence.block_table:
            raise IntegrityError(f"sequence {sequence.key!r} already owns blocks")
        copy: BlockCopy | None = None
        if match.head is not None and not match.is_takeover:
            self._own(match.head)
            self._held[match.head.index] += 1
        for block in match.blocks:
            self._own(block)
            sequence.block_table.append(block.index)
        if match.head is not None:
            if match.is_takeover:
                self._own(match.head)
                sequence.block_table.append(match.head.index)
            else:
                fresh = self._take()
                sequence.block_table.append(fresh.index)
                copy = BlockCopy(match.head.index, fresh.index, match.num_head_tokens)
        start = len(match.blocks) * self.block_size
        if copy is not None:
            # Not listed in the index before the copy has run: nobody may copy from what is not there yet.
            self._blocks[copy.destination].token_ids.extend(
                sequence.token_ids[start : start + copy.num_tokens]
            )
        sequence.num_slots = len(sequence.block_table) * self.block_size
        num_tokens = match.num_tokens(self.block_size)
        sequence.num_recorded_tokens = sequence.num_computed_tokens = num_tokens
        sequence.num_scheduled_tokens = num_tokens
        return copy

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make the table long enough for `num_tokens` tokens. False, and nothing changed, when blocks are
        short.
        """
        missing = -(-num_tokens // self.block_size) - len(sequence.block_table)
        if missing > self.num_available:
            return False
        # Whoever grows by decoding is brought up to date once a block, so that nobody has much to catch up.
        self.record(sequence)
        for _ in range(missing):
            sequence.block_table.append(self._take().index)
        sequence.num_slots = len(sequence.block_table) * self.block_size
        return True

    def record(self, sequence: Sequence) -> None:
        """Write down which tokens the sequence's blocks hold, for others to find.

        May come any number of steps late: before `match` is in time.
        """
        position, end = sequence.num_recorded_tokens, sequence.num_computed_tokens
        while position < end:
            i, offset = divmod(position, self.block_size)
            block = self._blocks[sequence.block_table[i]]
            if block.num_owners - self._held[block.index] > 1 or block.num_filled != offset:
                raise IntegrityError(
                    f"block {block.index} is shared or out of step: not to be written at {offset}"
                )
            stop = min(end, (i + 1) * self.block_size)
            block.token_ids.extend(sequence.token_ids[position:stop])
            if self.has_prefix_cache:
                self._list(sequence, i, block)
            position = sequence.num_recorded_tokens = stop

    def release(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Take back a sequence's blocks. What is worth keeping becomes Cached, tails older than heads, and is
        evicted after others' for the sequence's `retain_s`.

        What is not sound is kept by those who share it, and found by nobody else. A step in flight may still
        write behind the computed tokens; the blocks may be used again nevertheless, because whatever writes
        there for a new owner runs after that step, and nothing behind the recorded tokens is ever read.
        """
        if is_sound:
            self.record(sequence)
            if sequence.retain_s > 0:
                self._cached.retain((self._blocks[i] for i in sequence.block_table), sequence.retain_s)
        for index in reversed(sequence.block_table):
            block = self._blocks[index]
            if block.is_indexed and not is_sound:
                self._index.remove(block)
            self._disown(block)
        sequence.block_table.clear()
        sequence.num_slots = 0
        sequence.num_recorded_tokens = sequence.num_computed_tokens = sequence.num_scheduled_tokens = 0

    # -- around them ------------------------------------------------------------

    def finish_copy(self, copy: BlockCopy) -> None:
        """The step with this copy has run, or will not run: its source may go."""
        self._held[copy.source] -= 1
        if not self._held[copy.source]:
            del self._held[copy.source]
        self._disown(self._blocks[copy.source])

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: Free, or Cached and evictable."""
        return len(self._free) + len(self._cached)

    def counts(self) -> BlockCounts:
        """Blocks by state."""
        free, cached = len(self._free), len(self._cached)
        return BlockCounts(free, self.num_blocks - free - cached, cached)

    def next_head(self, sequence: Sequence, start: int) -> tuple[bytes, array[int]]:
        """The (parent hash, tokens) of the block of a sequence that begins at `start`."""
        i = start // self.block_size
        parent = self._block_hash(sequence, i - 1) if i else self._root(sequence)
        return parent, _tokens(sequence, start, min(start + self.block_size, len(sequence)))

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Recount everything from the live sequences. Raises IntegrityError on the first difference."""
        owners = Counter(index for sequence in sequences for index in sequence.block_table) + self._held
        free = {block.index for block in self._free}
        if len(free) != len(self._free):
            raise IntegrityError("a block is twice in the free list")
        listed = self._index.blocks()
        cached = set(self._cached.checked())
        for block in self._blocks:
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
        if sum(self.counts()) != self.num_blocks:
            raise IntegrityError("free + active + cached is not the number of blocks")

    # -- one block ------------------------------------------------------------

    def _take(self) -> Block:
        if self._free:
            block = self._free.popleft()
        else:
            block = self._cached.evict()
            self._index.remove(block)
            self._wipe(block)
        block.state = BlockState.ACTIVE
        block.num_owners = 1
        return block

    def _own(self, block: Block) -> None:
        if block.state is BlockState.CACHED:
            self._cached.remove(block)
            block.state = BlockState.ACTIVE
        elif block.state is BlockState.FREE:
            raise IntegrityError(f"block {block.index} is free and cannot be shared")
        block.num_owners += 1

    def _disown(self, block: Block) -> None:
        block.num_owners -= 1
        if block.num_owners < 0:
            raise IntegrityError(f"block {block.index} was given back too often")
        if block.num_owners:
            return
        is_partial = block.chain_hash is None
        if block.is_indexed and not (is_partial and self._index.is_covered(block)):
            block.state = BlockState.CACHED
            self._cached.add(block)
            return
        if block.is_indexed:
            self._index.remove(block)
        self._wipe(block)
        block.state = BlockState.FREE
        self._free.append(block)

    @staticmethod
    def _wipe(block: Block) -> None:
        block.token_ids = array(TOKEN_TYPECODE)
        block.parent_hash = b""
        block.chain_hash = None
        block.retained_until = 0.0

    def _list(self, sequence: Sequence, i: int, block: Block) -> None:
        """Index a block when it first becomes findable, and again when it becomes full."""
        is_full = block.num_filled == self.block_size
        if not is_full and (block.is_indexed or block.num_filled < self.min_head):
            return
        block.parent_hash = self._block_hash(sequence, i - 1) if i else self._root(sequence)
        if is_full:
            block.chain_hash = self._block_hash(sequence, i)
        self._index.add(block)

    def _root(self, sequence: Sequence) -> bytes:
        return root_hash(self._namespace, sequence.cache_salt)

    def _block_hash(self, sequence: Sequence, i: int) -> bytes:
        """The chain hash of the i-th full block of a sequence; computed once, kept with the sequence."""
        hashes = sequence.block_hashes
        while len(hashes) <= i:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else self._root(sequence)
            hashes.append(chain_hash(parent, sequence.token_ids[start : start + self.block_size]))
        return hashes[i]


def _tokens(sequence: Sequence, start: int, stop: int) -> array[int]:
    return array(TOKEN_TYPECODE, sequence.token_ids[start:stop])
