"""In which order sequences come: priority, then deadline, then arrival. Knows times, no blocks."""

from __future__ import annotations

import bisect

from services.engine.core.sequence import Sequence

NEVER = float("inf")

Rank = tuple[float, float, float]


def rank(sequence: Sequence) -> Rank:
    """The order among those that run; lower comes first."""
    deadline = NEVER if sequence.deadline is None else sequence.deadline
    return sequence.priority, deadline, sequence.arrival


def aged_rank(sequence: Sequence, now: float, ageing_s: float) -> Rank:
    """The order among those that wait: waiting `ageing_s` seconds is worth one step of priority."""
    priority, deadline, arrival = rank(sequence)
    return priority - (now - arrival) // ageing_s, deadline, arrival


def insert(ordered: list[Sequence], sequence: Sequence) -> None:
    """Put a sequence into a list in order of rank, behind its equals."""
    bisect.insort(ordered, sequence, key=rank)


def take_out(ordered: list[Sequence], sequence: Sequence) -> None:
    """Take a sequence out of a list in order of rank. Raises IndexError if it is not there."""
    i = bisect.bisect_left(ordered, rank(sequence), key=rank)
    while ordered[i] is not sequence:
        i += 1
    del ordered[i]
