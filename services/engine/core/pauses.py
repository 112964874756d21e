"""Since when which sequences are paused. Knows no blocks."""

from __future__ import annotations

from services.engine.core.sequence import Sequence, SequenceStatus


class Pauses:
    """The paused sequences, longest paused first. Times are in seconds of the core's clock."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._since: dict[Sequence, float] = {}

    def begin(self, sequence: Sequence, now: float) -> None:
        """A pause; of one that is paused already nothing changes."""
        self._since.setdefault(sequence, now)

    def end(self, sequence: Sequence) -> None:
        """The sequence goes on, or is over. May come twice."""
        self._since.pop(sequence, None)

    def num_running(self) -> int:
        """How many of them run."""
        return sum(sequence.status is SequenceStatus.RUNNING for sequence in self._since)

    def overdue(self, now: float) -> list[Sequence]:
        """Those paused for longer than the grace: each is named once in a pause."""
        if not self._since:
            return []
        limit = now - self._grace_s
        found = [sequence for sequence, since in self._since.items() if since <= limit]
        for sequence in found:
            self._since[sequence] = float("inf")
        return found
