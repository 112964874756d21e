"""What must hold between the scheduler's lists and the sequences in them. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from services.engine.core import ranks
from services.engine.core.errors import IntegrityError
from services.engine.core.sequence import Sequence, SequenceStatus


def check_lists(running: list[Sequence], waiting: list[Sequence], sequences: Iterable[Sequence]) -> None:
    """Every live sequence is in one list, with counts that fit together. Raises IntegrityError."""
    listed = {id(s): SequenceStatus.RUNNING for s in running}
    listed |= {id(s): SequenceStatus.WAITING for s in waiting}
    live = list(sequences)
    if not len(listed) == len(running) + len(waiting) == len(live):
        raise IntegrityError("the lists of sequences are not the live sequences")
    for s in live:
        counts = (s.num_recorded_tokens, s.num_computed_tokens, s.num_scheduled_tokens)
        is_known = s.num_foreseen_tokens - len(s.token_ids) in (0, 1)
        if listed.get(id(s)) is not s.status or not is_known:
            raise IntegrityError(f"sequence {s.key!r} is {s.status}, {s.num_foreseen_tokens} foreseen")
        if list(counts) != sorted(counts) or not counts[-1] <= min(s.num_slots, s.num_foreseen_tokens):
            raise IntegrityError(f"sequence {s.key!r}: {counts} tokens in {s.num_slots} slots")


def check_running(running: list[Sequence], prefilling: Collection[Sequence], num_paused: int) -> None:
    """What is kept about those who run, so that nobody need look through them. Raises IntegrityError."""
    if running != sorted(running, key=ranks.rank):
        raise IntegrityError("those who run are not in order of rank")
    if num_paused != sum(s.is_paused for s in running):
        raise IntegrityError("the paused ones among those who run are counted wrong")
    if any(s.num_uncomputed_tokens > 1 and s not in prefilling for s in running):
        raise IntegrityError("a sequence prefills that is not known to")
    if not all(s.status is SequenceStatus.RUNNING for s in prefilling):
        raise IntegrityError("a sequence is known to prefill that does not run")
