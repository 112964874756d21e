"""Sampling against an oracle of plain loops, against the probabilities it should have, and row by row."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.batch import SampledToken
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.runner.philox import DrawKeys, gumbel
from services.engine.runner.sampler import Sampler

VOCAB = 53


def _sequence(
    index: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> Sequence:
    return Sequence(
        key=index,
        prompt_token_ids=prompt or [1, 2, 3],
        emitted_token_ids=list(output or []),
        params=SamplingParams(max_tokens=100, **params),
        eos_token_ids=frozenset({1}),
        sample_index=index,
    )


def _logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def _token(result: SampledToken | Exception) -> int:
    assert isinstance(result, SampledToken), result
    return result.token_id


def _oracle_logits(logits: list[float], sequence: Sequence) -> list[float]:
    params, out = sequence.params, list(logits)
    for token, value in params.logit_bias:
        out[token] += value
    for token in sequence.banned_token_ids:
        out[token] = -math.inf
    seen = set(sequence.prompt_token_ids) | set(sequence.output_token_ids)
    for token in range(len(out)):
        count = sequence.output_token_ids.count(token)
        if token in seen:
            out[token] = (
                out[token] / params.repetition_penalty
                if out[token] > 0
                else out[token] * params.repetition_penalty
            )
        out[token] -= params.frequency_penalty * count
        out[token] -= params.presence_penalty * (count > 0)
    return out


def _oracle_kept(logits: list[float], params: SamplingParams) -> list[int]:
    """Ids left by min_p, top_k, top_p, likeliest first, lower ids first among equals."""
    highest = max(logits)
    weights = [math.exp((value - highest) / params.temperature) for value in logits]
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = [token for token in ranked if weights[token] >= params.min_p]
    if params.top_k:
        kept = kept[: params.top_k]
    total, before, out = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before >= params.top_p * total and out:
            break
        out.append(token)
        before += weights[token]
    return out


def _oracle_token(logits: Tensor, sequence: Sequence) -> int:
    edited = _oracle_logits(logits.tolist(), sequence)
    params = sequence.params
    if params.temperature == 0:
        return edited.index(max(edited))
    keys = DrawKeys([params.seed], [sequence.sample_index], [sequence.num_output_tokens])
    noise = gumbel(keys.all_words(len(edited)))[0].tolist()
    return max(
        _oracle_kept(edited, params), key=lambda token: edited[token] / params.temperature + noise[token]
    )


def _random_params(rng: random.Random) -> dict[str, Any]:
    return {
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.7]),
        "top_k": rng.choice([0, 0, 1, 3, 20, VOCAB, 10 * VOCAB]),
        "top_p": rng.choice([1.0, 1.0, 0.9, 0.5, 1e-6]),
        "min_p": rng.choice([0.0, 0.0, 0.1, 1.0]),
        "seed": rng.randrange(2**64),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3, 0.7]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.5, -0.5]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.4, -0.3]),
        "logit_bias": rng.choice([(), ((5, 2.0), (7, -100.0))]),
        "min_tokens": rng.choice([0, 0, 90]),
        "stop_token_ids": rng.choice([frozenset(), frozenset({4, 9})]),
        "logprobs": rng.choice([None, 0, 5]),
    }


def test_random_parameters_agree_with_the_oracle_and_rows_do_not_mix() -> None:
    rng = random.Random(3)
    for trial in range(40):
        sequences = [
            _sequence(
                index,
                prompt=[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))],
                output=[rng.randrange(VOCAB) for _ in range(rng.randrange(30))],
                **_random_params(rng),
            )
            for index in range(rng.randrange(1, 12))
        ]
        logits = _logits(len(sequences), seed=trial)
        together = Sampler(VOCAB).sample(logits, sequences)
        for row, sequence in enumerate(sequences):
            assert _token(together[row]) == _oracle_token(logits[row], sequence), sequence.params
            assert Sampler(VOCAB).sample(logits[row : row + 1], [sequence])[0] == together[row]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_top_p_of_a_large_vocabulary_agrees_with_the_oracle(top_p: float, temperature: float) -> None:
    logits = _logits(8, vocab=5003, seed=9)
    sequences = [_sequence(i, temperature=temperature, top_p=top_p, seed=i) for i in range(8)]
    found = [_token(result) for result in Sampler(5003).sample(logits, sequences)]
    assert found == [_oracle_token(logits[i], sequences[i]) for i in range(8)]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 8},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 20,000 seeded draws; 99.9% quantile by the Wilson-Hilferty approximation."""
    logits = _logits(1, vocab=24, seed=1, scale=1.0)
    settings = SamplingParams(max_tokens=1, **params)
    kept = _oracle_kept(logits[0].tolist(), settings)
    weights = {token: math.exp(float(logits[0, token]) / settings.temperature) for token in kept}
    counts = dict.fromkeys(kept, 0)
    sampler, draws = Sampler(24), 20_000
    for first in range(0, draws, 2000):
        sequences = [_sequence(0, seed=first + i, **params) for i in range(2000)]
        for result in sampler.sample(logits.expand(2000, -1), sequences):
            counts[_token(result)] += 1
    total = sum(weights.values())
    chi_square = sum((counts[t] - draws * w / total) ** 2 / (draws * w / total) for t, w in weights.items())
    freedom = max(1, len(kept) - 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def test_the_key_is_seed_index_and_offset() -> None:
    logits = _logits(1, vocab=4001, scale=0.1)
    base = _token(Sampler(4001).sample(logits, [_sequence(0, seed=5)])[0])
    assert _token(Sampler(4001).sample(logits, [_sequence(0, seed=5)])[0]) == base
    others = [
        _sequence(0, seed=6),
        _sequence(1, seed=5),
        _sequence(0, output=[9], seed=5),
        _sequence(0, seed=5 + 2**32),
    ]
    found = [_token(Sampler(4001).sample(logits, [sequence])[0]) for sequence in others]
    assert base not in found
    assert len(set(found)) == 4


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 30, 31]] = 1.0
    assert _token(Sampler(VOCAB).sample(logits, [_sequence(temperature=0.0)])[0]) == 7
    two = {_token(Sampler(VOCAB).sample(logits, [_sequence(seed=i, top_k=2)])[0]) for i in range(60)}
    assert two == {7, 30}
    logits[0, 7] = -0.0
    logits[0, [30, 31]] = 0.0
    one = {_token(Sampler(VOCAB).sample(logits, [_sequence(seed=i, top_k=1)])[0]) for i in range(20)}
    assert one == {0}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30}])
def test_the_narrowest_settings_are_greedy(params: dict[str, Any]) -> None:
    logits = _logits(20, seed=4)
    sequences = [_sequence(i, seed=i, **params) for i in range(20)]
    found = [_token(result) for result in Sampler(VOCAB).sample(logits, sequences)]
    assert found == logits.argmax(-1).tolist()


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = _logits(4, seed=2)
    raw = logits.double().log_softmax(-1)
    sequences = [
        _sequence(0, temperature=0.0, logprobs=0),
        _sequence(1, temperature=0.5, logit_bias=((6, 50.0),), logprobs=3),
        _sequence(2, temperature=0.0),
        _sequence(3, top_k=1, logprobs=20),
    ]
    results = Sampler(VOCAB).sample(logits, sequences)
    for row, count in ((0, 0), (1, 3), (3, 20)):
        result = results[row]
        assert isinstance(result, SampledToken)
        assert result.logprob == pytest.approx(float(raw[row, result.token_id]), abs=1e-9)
        expected = raw[row].topk(20)
        assert [token for token, _ in result.top_logprobs] == expected.indices[:count].tolist()
        assert [value for _, value in result.top_logprobs] == pytest.approx(expected.values[:count].tolist())
    assert _token(results[1]) == 6
    assert results[2] == SampledToken(int(logits[2].argmax()))


def test_counts_follow_the_output_and_are_forgotten() -> None:
    sampler = Sampler(VOCAB)
    logits = torch.zeros(1, VOCAB)
    sequence = _sequence(temperature=0.0, frequency_penalty=1.0)
    drawn = []
    for _ in range(VOCAB + 3):
        token = _token(sampler.sample(logits, [sequence])[0])
        sequence.append(token)
        drawn.append(token)
    assert drawn == [*range(VOCAB), 0, 1, 2]
    assert sampler.num_states == 1
    sampler.forget(sequence)
    sampler.forget(sequence)
    assert sampler.num_states == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = _logits(3)
    logits[1, 17] = bad
    sequences = [_sequence(i, temperature=0.0) for i in range(3)]
    results = Sampler(VOCAB).sample(logits, sequences)
    assert isinstance(results[1], Exception)
    assert [_token(results[0]), _token(results[2])] == [int(logits[0].argmax()), int(logits[2].argmax())]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"logit_bias": ((VOCAB, 1.0),)},
        {"logit_bias": ((1, float("nan")),)},
        {"logprobs": 21},
        {"stop_token_ids": frozenset({VOCAB})},
    ],
)
def test_bad_parameters_fail_their_row_alone(params: dict[str, Any]) -> None:
    logits = _logits(2)
    results = Sampler(VOCAB).sample(logits, [_sequence(0, **params), _sequence(1, temperature=0.0)])
    assert isinstance(results[0], Exception)
    assert _token(results[1]) == int(logits[1].argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("extra", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_a_row_with_everything_banned_fails(temperature: float, extra: dict[str, Any]) -> None:
    everything = frozenset(range(VOCAB))
    sequence = _sequence(temperature=temperature, stop_token_ids=everything, min_tokens=3, **extra)
    assert isinstance(Sampler(VOCAB).sample(_logits(1), [sequence])[0], Exception)


def test_an_empty_batch_gives_nothing() -> None:
    assert Sampler(VOCAB).sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 500, "top_p": 0.8}])
def test_a_lone_row_of_a_large_vocabulary_has_its_bits(params: dict[str, Any]) -> None:
    """Beyond 32,768 columns torch would sum a single row over threads, in another order."""
    logits = _logits(3, vocab=50_021, seed=8)
    sequences = [_sequence(i, seed=i, logprobs=4, **params) for i in range(3)]
    together = Sampler(50_021).sample(logits, sequences)
    for row in range(3):
        assert Sampler(50_021).sample(logits[row : row + 1], [sequences[row]])[0] == together[row]
