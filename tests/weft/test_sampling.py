"""The validator at every limit: one below, at it, one above; and the values that are no numbers."""

from __future__ import annotations

import math
import struct

import pytest

from weft import sampling
from weft.limits import DEFAULT_LIMITS
from weft.sampling import (
    validate_labels,
    validate_length,
    validate_sampling,
    validate_stop,
    validate_token_ids,
)
from weft.v1 import generation_pb2 as pb

VOCAB = 4096
LENGTH = 1000


def bad_fields(max_n: int = DEFAULT_LIMITS.max_n, **fields: object) -> list[str]:
    params = pb.SamplingParams(**fields)  # type: ignore[arg-type]
    found = validate_sampling(params, vocab_size=VOCAB, max_model_len=LENGTH, max_n=max_n)
    return [violation.field for violation in found]


def next_float(value: float, toward: float) -> float:
    """The neighbouring 32-bit float."""
    bits = struct.unpack("i", struct.pack("f", value))[0]
    if value == 0:
        return math.copysign(struct.unpack("f", struct.pack("i", 1))[0], toward)
    step = 1 if (toward > value) == (value > 0) else -1
    return struct.unpack("f", struct.pack("i", bits + step))[0]


def test_nothing_set_is_fine():
    assert bad_fields() == []


@pytest.mark.parametrize("name", sampling.FLOAT_RANGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -1e39])
def test_what_is_no_number_is_refused(name, value):
    assert bad_fields(**{name: value}) == [f"sampling.{name}"]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
        ("repetition_penalty", sampling.MIN_REPETITION_PENALTY, 100.0),
        ("temperature", sampling.MIN_TEMPERATURE, 100.0),
    ],
)
def test_float_limits(name, low, high):
    for inside in (low, high, next_float(low, 1e30), next_float(high, -1e30)):
        assert bad_fields(**{name: inside}) == []
    for outside in (next_float(low, -1e30), next_float(high, 1e30)):
        assert bad_fields(**{name: outside}) == [f"sampling.{name}"]


def test_top_p_is_above_zero():
    assert bad_fields(top_p=next_float(0.0, 1.0)) == []
    assert bad_fields(top_p=1.0) == []
    for outside in (0.0, -0.0, -0.5, 1.0000001, 2.0):
        assert bad_fields(top_p=outside) == ["sampling.top_p"]


def test_temperature_zero_is_greedy_but_almost_zero_is_refused():
    assert bad_fields(temperature=0.0) == []
    assert bad_fields(temperature=-0.0) == []
    for outside in (-0.1, -1.0, 1e-38, 1e-45):
        assert bad_fields(temperature=outside) == ["sampling.temperature"]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("top_k", 0, VOCAB),
        ("n", 1, 8),
        ("logprobs", 0, 20),
        ("max_tokens", 1, LENGTH),
        ("min_tokens", 0, LENGTH),
    ],
)
def test_count_limits(name, low, high):
    for inside in (low, low + 1, high - 1, high):
        assert bad_fields(**{name: inside}) == []
    outside = [high + 1, 2**31 - 1, 2**31, 2**32 - 1] + ([low - 1] if low else [])
    for value in outside:
        assert bad_fields(**{name: value}) == [f"sampling.{name}"]


def test_a_negative_count_cannot_slip_through_the_wire():
    # -1 as a 64-bit varint in an unsigned 32-bit field arrives as its low bits.
    params = pb.SamplingParams.FromString(b"\x60" + b"\xff" * 9 + b"\x01")
    assert params.max_tokens == 2**32 - 1
    assert [v.field for v in validate_sampling(params, vocab_size=None)] == ["sampling.max_tokens"]


def test_one_sample_where_a_request_is_one():
    assert bad_fields(max_n=1, n=1) == []
    assert bad_fields(max_n=1, n=2) == ["sampling.n"]
    assert bad_fields(max_n=1, n=0) == ["sampling.n"]


def test_logprobs_of_a_tiny_vocabulary():
    params = pb.SamplingParams(logprobs=6)
    assert validate_sampling(params, vocab_size=6) == []
    assert validate_sampling(params, vocab_size=5) != []


def test_min_tokens_above_max_tokens():
    assert bad_fields(min_tokens=5, max_tokens=5) == []
    assert bad_fields(min_tokens=6, max_tokens=5) == ["sampling.min_tokens"]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_every_seed_is_fine(seed):
    assert bad_fields(seed=seed) == []


def bias(token_id: int, value: float = 1.0) -> pb.SamplingParams.LogitBias:
    return pb.SamplingParams.LogitBias(token_id=token_id, bias=value)


def test_logit_bias():
    for count in (DEFAULT_LIMITS.max_logit_bias - 1, DEFAULT_LIMITS.max_logit_bias):
        assert bad_fields(logit_bias=[bias(i) for i in range(count)]) == []
    too_many = [bias(i) for i in range(DEFAULT_LIMITS.max_logit_bias + 1)]
    assert bad_fields(logit_bias=too_many) == ["sampling.logit_bias"]
    assert bad_fields(logit_bias=[bias(VOCAB - 1), bias(VOCAB)]) == ["sampling.logit_bias[1].token_id"]
    assert bad_fields(logit_bias=[bias(7), bias(7)]) == ["sampling.logit_bias[1].token_id"]
    assert bad_fields(logit_bias=[bias(0, 100.0), bias(1, -100.0)]) == []
    for value in (100.01, -100.01, math.nan, math.inf):
        assert bad_fields(logit_bias=[bias(0, value)]) == ["sampling.logit_bias[0].bias"]


def test_stop_token_ids():
    for count in (63, 64):
        assert bad_fields(stop_token_ids=range(count)) == []
    assert bad_fields(stop_token_ids=range(65)) == ["sampling.stop_token_ids"]
    assert bad_fields(stop_token_ids=[VOCAB - 1, VOCAB]) == ["sampling.stop_token_ids[1]"]


def test_the_number_of_violations_is_bounded():
    assert len(bad_fields(logit_bias=[bias(VOCAB + i, 1e9) for i in range(300)])) == sampling.MAX_VIOLATIONS


def test_stop_strings():
    for count in (15, 16):
        assert validate_stop(["x"] * count) == []
    assert validate_stop(["x"] * 17)[0].field == "stop"
    assert validate_stop(["x"] * 10_000)[0].field == "stop"
    assert validate_stop(["x" * 255, "x" * 256, "ä" * 128]) == []
    for text in ("x" * 257, "ä" * 128 + "x", "\U0001f600" * 65, "x" * (1 << 20)):
        assert [v.field for v in validate_stop(["ok", text])] == ["stop[1]"]
    assert [v.field for v in validate_stop([""])] == ["stop[0]"]
    assert validate_stop(["\ufeff"]) == []


def test_token_ids():
    assert validate_token_ids([0, VOCAB - 1], vocab_size=VOCAB, field="p") == []
    assert validate_token_ids([0, VOCAB], vocab_size=VOCAB, field="p")[0].field == "p[1]"
    assert validate_token_ids([2**32 - 1], vocab_size=VOCAB, field="p")[0].field == "p[0]"
    assert validate_token_ids([], vocab_size=VOCAB, field="p")[0].field == "p"
    assert validate_token_ids([], vocab_size=VOCAB, field="p", can_be_empty=True) == []


def length(num_prompt_tokens: int, max_tokens: int | None) -> list[str]:
    found = validate_length(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, max_model_len=LENGTH)
    return [violation.field for violation in found]


def test_prompt_and_output_fit_together():
    assert length(LENGTH - 1, None) == []
    assert length(LENGTH - 1, 1) == []
    assert length(LENGTH - 1, 2) == ["sampling.max_tokens"]
    for too_long in (LENGTH, LENGTH + 1):
        assert length(too_long, None) == ["prompt_token_ids"]
        assert length(too_long, 1) == ["prompt_token_ids"]


def test_labels():
    assert list(validate_labels(request_id="a" * 128, priority=100, cache_salt="s" * 256)) == []
    assert list(validate_labels(priority=-100)) == []
    for request_id in ("a" * 129, "a/b", "a\n", "ä"):
        assert [v.field for v in validate_labels(request_id=request_id)] == ["request_id"]
    for priority in (101, -101, 2**31 - 1, -(2**31)):
        assert [v.field for v in validate_labels(priority=priority)] == ["priority"]
    assert [v.field for v in validate_labels(cache_salt="s" * 257)] == ["cache_salt"]
