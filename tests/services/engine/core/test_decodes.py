"""Rows taken in quickly give what the long way gives; whatever is special about a row is left to it."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest

from services.engine.core.batch import Chunk, SampledToken
from services.engine.core.decodes import take_decodes
from services.engine.core.events import Tokens
from services.engine.core.journal import Journal
from services.engine.core.sequence import FinishReason, SamplingParams, SequenceStatus
from tests.services.engine.core.oracle import make_sequence

NOW = 7.5


def decoding(key, num_output=3, *, eos=(), max_tokens=9, **params):
    """The chunk of the next token of a running sequence that has drawn some."""
    sequence = make_sequence(
        key,
        [5, 6, 7],
        params=SamplingParams(max_tokens, **params),
        output=range(20, 20 + num_output),
        eos_token_ids=frozenset(eos),
    )
    sequence.status = SequenceStatus.RUNNING
    sequence.num_computed_tokens = len(sequence) - 1
    sequence.first_token_at, sequence.last_token_at = 6.0, 7.25
    return Chunk(sequence, len(sequence) - 1, 1, True)


def the_long_way(chunk, token):
    """What the core does with one row of any kind."""
    journal, sequence = Journal(), chunk.sequence
    sequence.num_computed_tokens = chunk.start + chunk.length
    journal.token(sequence, token, NOW)
    return journal.tokens, sequence.append(token.token_id)


def state(sequence):
    """Every field but the chunks, which point back."""
    names = [name for name in sequence.__slots__ if name != "decode_chunks"]
    return {name: getattr(sequence, name) for name in names}


@pytest.mark.parametrize("seed", range(50))
def test_a_plain_row_is_what_the_long_way_makes_of_it(seed):
    rng = random.Random(seed)
    chunks = [
        decoding(
            ("row", index),
            rng.randint(1, 6),
            max_tokens=rng.randint(7, 9),
            min_tokens=rng.randint(0, 8),
            stop_token_ids=frozenset(rng.sample(range(30, 40), 3)),
            eos={30},
        )
        for index in range(rng.randint(1, 8))
    ]
    drawn = [SampledToken(rng.randint(28, 41)) for _ in chunks]
    twins, tokens = deepcopy(chunks), Tokens()
    ended, others = take_decodes(chunks, drawn, tokens, NOW)
    assert others == []
    expected, expected_ends = Tokens(), []
    for chunk, token in zip(twins, drawn, strict=True):
        row, reason = the_long_way(chunk, token)
        expected.extend(row, row.keys)
        if reason is not None:
            expected_ends.append((chunk.sequence.key, reason))
    assert tokens == expected
    assert [(sequence.key, reason) for sequence, reason in ended] == expected_ends
    assert [state(c.sequence) for c in chunks] == [state(c.sequence) for c in twins]


def first_token(chunk):
    chunk.sequence.first_token_at = chunk.sequence.last_token_at = None


def paused_before(chunk):
    chunk.sequence.last_token_at = None


def prompt(chunk):
    chunk.start, chunk.length = chunk.start - 2, 3


def ended(chunk):
    chunk.sequence.status = SequenceStatus.FINISHED


def preempted(chunk):
    chunk.sequence.status = SequenceStatus.WAITING


def plain(chunk):
    pass


@pytest.mark.parametrize(
    ("become", "output"),
    [
        (first_token, SampledToken(9)),
        (paused_before, SampledToken(9)),
        (prompt, SampledToken(9)),
        (ended, SampledToken(9)),
        (preempted, SampledToken(9)),
        (plain, SampledToken(9, -0.5)),
        (plain, ValueError("not finite")),
        (plain, None),
    ],
    ids=["first", "pause", "prompt", "ended", "preempted", "logprob", "failure", "no token"],
)
def test_a_special_row_is_left_as_it_was(become, output):
    chunks = [decoding(index) for index in range(3)]
    become(chunks[1])
    before = state(deepcopy(chunks[1].sequence))
    tokens = Tokens()
    last, others = take_decodes(chunks, [SampledToken(9), output, SampledToken(9)], tokens, NOW)
    assert (last, others) == ([], [(chunks[1], output)])
    assert state(chunks[1].sequence) == before
    assert tokens.keys == [0, 2]
    assert tokens.positions == [3, 3]


def test_a_row_that_cannot_be_taken_becomes_a_failure_of_its_own():
    chunks, tokens = [decoding(index) for index in range(3)], Tokens()
    drawn = [SampledToken(9), SampledToken([]), SampledToken(9)]
    _, others = take_decodes(chunks, drawn, tokens, NOW)
    [(chunk, error)] = others
    assert chunk is chunks[1]
    assert isinstance(error, TypeError)
    assert tokens.keys == [0, 2]
    assert len(tokens.token_ids) == len(tokens.positions) == len(tokens.itls_s) == 2


def test_outputs_that_are_too_few_are_a_fault():
    with pytest.raises(ValueError, match="shorter"):
        take_decodes([decoding(0), decoding(1)], [SampledToken(9)], Tokens(), NOW)


def test_why_it_ends():
    chunks = [decoding(0, max_tokens=4), decoding(1, stop_token_ids=frozenset({9}))]
    ends, _ = take_decodes(chunks, [SampledToken(9)] * 2, Tokens(), NOW)
    assert [reason for _, reason in ends] == [FinishReason.LENGTH, FinishReason.STOP]
