"""Who is late is found when a look at everybody, every time, would find it."""

from __future__ import annotations

import random

import pytest

from services.engine.core.deadlines import MIN_MARGIN_S, Deadlines
from tests.services.engine.core.oracle import make_sequence


def is_late(sequence, now):
    """The rule itself."""
    margin = max(MIN_MARGIN_S, 2 * sequence.last_itl_s) if sequence.num_output_tokens else 0.0
    return now >= sequence.deadline - margin


@pytest.mark.parametrize("seed", range(40))
def test_nobody_is_found_later_than_by_looking_always(seed):
    rng = random.Random(seed)
    deadlines, now, ended = Deadlines(), 100.0, []
    live = [make_sequence(i, [1], deadline=now + rng.uniform(0, 20)) for i in range(8)]
    live += [make_sequence("none", [1])]
    for sequence in live:
        deadlines.add(sequence)
    for _ in range(300):
        now += rng.choice([0.001, 0.01, 0.1, rng.uniform(0, 3)])
        found = deadlines.late(now)
        assert set(found) == {s for s in live if s.deadline is not None and is_late(s, now)}
        for sequence in found:
            deadlines.discard(sequence)
            live.remove(sequence)
            ended.append(sequence)
        for sequence in live:
            if rng.random() < 0.7:
                if sequence.last_token_at is not None:
                    sequence.last_itl_s = now - sequence.last_token_at
                sequence.last_token_at = now
                sequence.token_ids.append(1)
            elif rng.random() < 0.02 and sequence.deadline is not None:
                sequence.deadline = now + rng.uniform(0, 5)
                deadlines.add(sequence)
    assert [s.key for s in live] == ["none"]


def test_a_far_deadline_costs_few_looks():
    deadlines, sequence = Deadlines(), make_sequence("a", [1], deadline=1000.0)
    deadlines.add(sequence)

    class Counted(dict):
        looks = 0

        def __iter__(self):
            Counted.looks += 1
            return super().__iter__()

    deadlines._sequences = Counted(deadlines._sequences)
    now = 0.0
    while not deadlines.late(now):
        now += 0.01
    assert now == pytest.approx(1000.0, abs=0.011)
    assert Counted.looks < 50
