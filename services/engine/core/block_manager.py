"""Who owns which block of the KV cache.

Five verbs: `match` finds what is cached, `allocate` takes it, `reserve` gets room for more tokens, `record`
writes down what has been computed, `release` gives everything back. Knows no tensors, no scheduling, no
requests.
"""

from __future__ import annotations

from array import array
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
from services.engine.core.block_pool import BlockPool, owners_of
from services.engine.core.errors import IntegrityError
from services.engine.core.prefix_index import PrefixIndex
from services.engine.core.sequence import Sequence
from services.engine.core.writers import Writers

DEFAULT_MIN_HEAD = 4
"""Shortest common head worth a copy, in tokens: measured on a CPU, where 4 tokens cost 29 copies."""


class BlockManager:
    """The verbs over a pool of blocks.

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
        self._index = PrefixIndex(block_size, self.min_head)
        self._pool = BlockPool(num_blocks, self._index, now)
        self._blocks = self._pool.blocks
        self._writers = Writers()

    # -- the five verbs ------------------------------------------------------------

    def match(self, sequence: Sequence) -> Match:
        """The longest cached head of a sequence, always leaving its last token to be computed.

        Finds all that has been computed: who is behind with writing down what could be found is brought up to
        date.
        """
        match = Match()
        if not self.has_prefix_cache:
            return match
        limit = len(sequence) - 1
        size = self.block_size
        while True:
            start = len(match.blocks) * size
            prefix, tokens = (
                self._prefix(sequence, start // size),
                _tokens(sequence, start, min(start + size, limit)),
            )
            self._catch_up(prefix, tokens)
            if len(tokens) < size:
                break
            full = self._index.find_full(self._prefix(sequence, start // size + 1), tokens)
            if full is None:
                break
            match.blocks.append(full)
        found = self._index.find_head(prefix, tokens)
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
            self._pool.hold(match.head)
        for block in match.blocks:
            self._pool.own(block)
            sequence.block_table.append(block.index)
        if match.head is not None:
            if match.is_takeover:
                self._pool.own(match.head)
                sequence.block_table.append(match.head.index)
            else:
                fresh = self._pool.take()
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
        if self.has_prefix_cache:
            self._writers.put(sequence, self._place(sequence))
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
            sequence.block_table.append(self._pool.take().index)
        sequence.num_slots = len(sequence.block_table) * self.block_size
        return True

    def record(self, sequence: Sequence) -> None:
        """Write down which tokens the sequence's blocks hold, for others to find.

        May come any number of steps late: `match` sees to it where it matters.
        """
        position, end = sequence.num_recorded_tokens, sequence.num_computed_tokens
        while position < end:
            i, offset = divmod(position, self.block_size)
            block = self._blocks[sequence.block_table[i]]
            if block.num_filled != offset or self._pool.is_shared(block):
                raise IntegrityError(
                    f"block {block.index} is shared or out of step: not to be written at {offset}"
                )
            stop = min(end, (i + 1) * self.block_size)
            block.token_ids.extend(sequence.token_ids[position:stop])
            if self.has_prefix_cache:
                self._list(sequence, i, block)
            position = sequence.num_recorded_tokens = stop
        if self.has_prefix_cache:
            self._writers.put(sequence, self._place(sequence))

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
                self._pool.cached.retain((self._blocks[i] for i in sequence.block_table), sequence.retain_s)
        self._writers.discard(sequence)
        for index in reversed(sequence.block_table):
            block = self._blocks[index]
            if block.is_indexed and not is_sound:
                self._index.remove(block)
            self._pool.disown(block)
        sequence.block_table.clear()
        sequence.num_slots = 0
        sequence.num_recorded_tokens = sequence.num_computed_tokens = sequence.num_scheduled_tokens = 0

    # -- around them ------------------------------------------------------------

    def finish_copy(self, copy: BlockCopy) -> None:
        """The step with this copy has run, or will not run: its source may go."""
        self._pool.finish_copy(copy)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: Free, or Cached and evictable."""
        return self._pool.num_available

    @property
    def num_retained(self) -> int:
        """Cached blocks that are evicted last."""
        return self._pool.cached.num_retained

    def counts(self) -> BlockCounts:
        """Blocks by state."""
        return self._pool.counts()

    def next_head(self, sequence: Sequence, start: int) -> tuple[bytes, array[int]]:
        """The (parent hash, tokens) of the block of a sequence that begins at `start`."""
        parent = self._prefix(sequence, start // self.block_size)
        return parent, _tokens(sequence, start, min(start + self.block_size, len(sequence)))

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Recount everything from the live sequences. Raises IntegrityError on the first difference."""
        owning = [sequence for sequence in sequences if sequence.block_table]
        self._pool.check_integrity(owners_of(sequence.block_table for sequence in owning))
        expected = {sequence: self._place(sequence) for sequence in owning}
        if self._writers.places() != (expected if self.has_prefix_cache else {}):
            raise IntegrityError("the writers are not the sequences with blocks")

    # -- names ------------------------------------------------------------

    def _list(self, sequence: Sequence, i: int, block: Block) -> None:
        """Index a block when it first becomes findable, and again when it becomes full."""
        is_full = block.num_filled == self.block_size
        if not is_full and (block.is_indexed or block.num_filled < self.min_head):
            return
        block.parent_hash = self._prefix(sequence, i)
        if is_full:
            block.chain_hash = self._prefix(sequence, i + 1)
        self._index.add(block)

    def _catch_up(self, prefix: bytes, tokens: array[int]) -> None:
        """Write down what sequences hold that somebody with these tokens behind this prefix could share."""
        for writer in self._writers.behind(prefix):
            self.record(writer)
        if len(tokens) >= self.min_head:
            for writer in self._writers.behind(prefix + tokens[: self.min_head].tobytes()):
                self.record(writer)

    def _place(self, sequence: Sequence) -> bytes:
        """Where a sequence's next token to be written down belongs: behind a prefix; and once that block is
        long enough to be shared, behind its first tokens, for others have nothing to look for in it.
        """
        num_blocks, num_written = divmod(sequence.num_recorded_tokens, self.block_size)
        prefix = self._prefix(sequence, num_blocks)
        if num_written < self.min_head:
            return prefix
        start = num_blocks * self.block_size
        return prefix + _tokens(sequence, start, start + self.min_head).tobytes()

    def _prefix(self, sequence: Sequence, num_blocks: int) -> bytes:
        """The name of the first `num_blocks` full blocks of a sequence; computed once, kept with it."""
        names = sequence.prefix_names
        if not names:
            names.append(root_hash(self._namespace, sequence.cache_salt))
        while len(names) <= num_blocks:
            end = len(names) * self.block_size
            names.append(chain_hash(names[-1], sequence.token_ids[end - self.block_size : end]))
        return names[num_blocks]


def _tokens(sequence: Sequence, start: int, stop: int) -> array[int]:
    return array(TOKEN_TYPECODE, sequence.token_ids[start:stop])
