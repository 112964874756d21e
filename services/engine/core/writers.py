"""Who is writing where: the sequences whose newest tokens the block manager has not seen.

A decoding sequence is written down once a block, not once a token. Whoever looks for a prefix asks here whose
tokens could matter to it, so that nobody else need be brought up to date. Knows places by name, no blocks.
"""

from __future__ import annotations

from services.engine.core.sequence import Sequence


class Writers:
    """Name of a place -> the sequences whose next token to be written down belongs there."""

    def __init__(self) -> None:
        self._at: dict[bytes, dict[Sequence, None]] = {}
        self._places: dict[Sequence, bytes] = {}

    def put(self, sequence: Sequence, place: bytes) -> None:
        """A sequence writes here from now on."""
        if self._places.get(sequence) != place:
            self.discard(sequence)
            self._places[sequence] = place
            self._at.setdefault(place, {})[sequence] = None

    def discard(self, sequence: Sequence) -> None:
        """It writes no more, if it ever did."""
        place = self._places.pop(sequence, None)
        if place is not None:
            there = self._at[place]
            del there[sequence]
            if not there:
                del self._at[place]

    def behind(self, place: bytes) -> list[Sequence]:
        """Those here who have tokens that are not written down."""
        there = self._at.get(place)
        if there is None:
            return []
        return [s for s in there if s.num_recorded_tokens < s.num_computed_tokens]

    def places(self) -> dict[Sequence, bytes]:
        """Every sequence and where it writes, for integrity checks."""
        return {sequence: place for place, there in self._at.items() for sequence in there}
