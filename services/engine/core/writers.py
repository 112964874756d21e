"""Who is writing behind which prefix: the sequences whose newest tokens the block manager has not seen.

A decoding sequence is written down once a block, not once a token. Whoever looks for a prefix asks here whose
tokens could matter to it, so that nobody else need be brought up to date. Knows names of prefixes, no blocks.
"""

from __future__ import annotations

from services.engine.core.sequence import Sequence


class Writers:
    """Name of a prefix -> the sequences that are to be written down in the block after it."""

    def __init__(self) -> None:
        self._after: dict[bytes, dict[Sequence, None]] = {}

    def add(self, sequence: Sequence, prefix: bytes) -> None:
        """A sequence begins to write after this prefix."""
        self._after.setdefault(prefix, {})[sequence] = None

    def discard(self, sequence: Sequence, prefix: bytes) -> None:
        """It is done there, if it ever began."""
        sequences = self._after.get(prefix)
        if sequences is not None:
            sequences.pop(sequence, None)
            if not sequences:
                del self._after[prefix]

    def move(self, sequence: Sequence, old: bytes, new: bytes) -> None:
        """It goes on after another prefix."""
        self.discard(sequence, old)
        self.add(sequence, new)

    def behind(self, prefix: bytes) -> list[Sequence]:
        """Those after this prefix who have tokens that are not written down."""
        found = self._after.get(prefix)
        if found is None:
            return []
        return [s for s in found if s.num_recorded_tokens < s.num_computed_tokens]

    def all(self) -> dict[Sequence, bytes]:
        """Every sequence and its prefix, for integrity checks."""
        return {sequence: prefix for prefix, sequences in self._after.items() for sequence in sequences}
