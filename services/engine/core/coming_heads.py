"""Computing a shared prefix once: what running sequences are about to compute, for others to wait for.

Knows blocks through the block manager. Does not know who is scheduled when, nor for how long anybody waits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from services.engine.core.block import common_head
from services.engine.core.block_manager import BlockManager
from services.engine.core.sequence import Sequence


class ComingHeads:
    """Parent hash -> tokens of the blocks after it that the running prefills will have computed."""

    def __init__(self, blocks: BlockManager, running: Iterable[Sequence]) -> None:
        self._blocks = blocks
        self._heads: dict[bytes, list[array[int]]] = {}
        for sequence in running:
            if sequence.num_uncomputed_tokens > 1 and not sequence.is_paused:
                self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """Note what a sequence will compute."""
        if not self._blocks.has_prefix_cache:
            return  # Nothing is shared, so nothing is worth waiting for.
        size = self._blocks.block_size
        first = sequence.num_computed_tokens - sequence.num_computed_tokens % size
        for start in range(first, len(sequence), size):
            parent, tokens = self._blocks.next_head(sequence, start)
            self._heads.setdefault(parent, []).append(tokens)

    def is_worth_waiting_for(self, sequence: Sequence) -> bool:
        """Whether waiting for a running prefill saves at least half of what is left of the next block."""
        if not self._heads:
            return False
        match = self._blocks.match(sequence)
        start = len(match.blocks) * self._blocks.block_size
        parent, tokens = self._blocks.next_head(sequence, start)
        wanted = len(tokens) - (start + len(tokens) == len(sequence))
        for coming in self._heads.get(parent, ()):
            gain = min(common_head(coming, tokens), wanted) - match.num_head_tokens
            if gain >= self._blocks.min_head and 2 * gain >= wanted - match.num_head_tokens:
                return True
        return False
