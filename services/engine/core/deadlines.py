"""Which live sequences are past their deadline, or too near it for one more token to arrive in time.

Nobody is looked at before anybody can be late: a step with no deadline close by costs one comparison. Knows
sequences and times; ends nothing itself.
"""

from __future__ import annotations

from services.engine.core.sequence import Sequence

MIN_MARGIN_S = 0.05
"""A stream is ended this long before its deadline, or two gaps between tokens, so that its last message
arrives.
"""
NEVER = float("inf")


class Deadlines:
    """The sequences with a deadline, in seconds of the core's clock."""

    def __init__(self) -> None:
        self._sequences: dict[Sequence, None] = {}
        self._look_at = NEVER

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence, if it has a deadline. Again after its deadline has changed."""
        if sequence.deadline is not None:
            self._sequences[sequence] = None
            self._look_at = -NEVER

    def discard(self, sequence: Sequence) -> None:
        """Watch it no more."""
        self._sequences.pop(sequence, None)

    def late(self, now: float) -> list[Sequence]:
        """The sequences to end now."""
        if now < self._look_at:
            return []
        found: list[Sequence] = []
        self._look_at = NEVER
        for sequence in self._sequences:
            left = (sequence.deadline or 0.0) - now
            if left <= _margin(sequence):
                found.append(sequence)
            else:
                self._look_at = min(self._look_at, now + _safe_s(sequence, left, now))
        return found


def _margin(sequence: Sequence) -> float:
    return max(MIN_MARGIN_S, 2 * sequence.last_itl_s) if sequence.num_output_tokens else 0.0


def _safe_s(sequence: Sequence, left: float, now: float) -> float:
    """For so long it cannot get late.

    After t more seconds the newest gap between its tokens is at most t plus what has passed of it by now, and
    two such gaps fit into what is left then while 3 t does so now.
    """
    begun = 0.0 if sequence.last_token_at is None else now - sequence.last_token_at
    return max(0.0, left - max(MIN_MARGIN_S, 2 * sequence.last_itl_s, 2 * begun)) / 3
