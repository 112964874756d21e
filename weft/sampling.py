"""The one validator of what a request may ask for. Gateway and engine both call it, so neither can be
talked past.

Pure: protobuf messages and plain values in, violations out. Knows limits, not how anything is drawn.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, TypeAlias

from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.v1 import generation_pb2 as pb

MAX_ABS_BIAS = 100.0
MAX_TEMPERATURE = 100.0
# Below it a division of ordinary logits may overflow; 0 asks for greedy.
MIN_TEMPERATURE = struct.unpack("f", struct.pack("f", 1e-4))[0]
MAX_ABS_PENALTY = 2.0
MIN_REPETITION_PENALTY = struct.unpack("f", struct.pack("f", 0.01))[0]
MAX_REPETITION_PENALTY = 100.0
# Counts of tokens above it are no counts: a negative number in an unsigned field arrives as one.
MAX_TOKEN_COUNT = 2**31 - 1
MAX_ABS_PRIORITY = 100
MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_BYTES = 256
MAX_VIOLATIONS = 20
_Report: TypeAlias = "Callable[[str, str], None]"
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._-]{{0,{MAX_REQUEST_ID_CHARS}}}")


class FieldViolation(NamedTuple):
    """One bad field: its path as the client wrote it, and what is wrong, safe to show."""

    field: str
    description: str


class _Range(NamedTuple):
    """The numbers that a float field may hold. `also` is one more number that is allowed."""

    low: float
    high: float
    is_low_open: bool = False
    also: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value is allowed. NaN and infinities never are."""
        if not math.isfinite(value):
            return False
        if self.also is not None and value == self.also:
            return True
        return (self.low < value if self.is_low_open else self.low <= value) and value <= self.high

    def text(self) -> str:
        """As in "must be above 0, at most 1"."""
        low = f"above {self.low:g}" if self.is_low_open else f"at least {self.low:g}"
        return f"must be {'' if self.also is None else f'{self.also:g}, or '}{low}, at most {self.high:g}"


FLOAT_RANGES = {
    "temperature": _Range(MIN_TEMPERATURE, MAX_TEMPERATURE, also=0.0),
    "top_p": _Range(0.0, 1.0, is_low_open=True),
    "min_p": _Range(0.0, 1.0),
    "repetition_penalty": _Range(MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "presence_penalty": _Range(-MAX_ABS_PENALTY, MAX_ABS_PENALTY),
    "frequency_penalty": _Range(-MAX_ABS_PENALTY, MAX_ABS_PENALTY),
}
_BIAS_RANGE = _Range(-MAX_ABS_BIAS, MAX_ABS_BIAS)


def validate_sampling(
    params: pb.SamplingParams,
    *,
    vocab_size: int | None,
    max_model_len: int | None = None,
    max_n: int | None = None,
    field_prefix: str = "sampling",
    limits: RequestLimits = DEFAULT_LIMITS,
) -> list[FieldViolation]:
    """What is wrong with sampling parameters, at most `MAX_VIOLATIONS`; empty when nothing is.

    `vocab_size` and `max_model_len` None leave out the checks that need them. `max_n` is 1 where a request
    is one sample; None leaves it to `limits`. Work is bounded by the limits, not by what was sent.
    """
    found: list[FieldViolation] = []

    def bad(name: str, description: str) -> None:
        found.append(FieldViolation(f"{field_prefix}.{name}" if field_prefix else name, description))

    for name, allowed in FLOAT_RANGES.items():
        if params.HasField(name) and not allowed.holds(getattr(params, name)):
            bad(name, allowed.text())
    for name, low, high in (
        ("top_k", 0, vocab_size or MAX_TOKEN_COUNT),
        ("n", 1, limits.max_n if max_n is None else max_n),
        ("logprobs", 0, min(limits.max_logprobs, vocab_size or limits.max_logprobs)),
        ("min_tokens", 0, max_model_len or MAX_TOKEN_COUNT),
        ("max_tokens", 1, max_model_len or MAX_TOKEN_COUNT),
    ):
        if params.HasField(name) and not low <= getattr(params, name) <= high:
            bad(name, f"must be {low} to {high}" if low < high else f"must be {low}")
    if params.HasField("max_tokens") and params.min_tokens > params.max_tokens:
        bad("min_tokens", "must not be above max_tokens")
    _check_logit_bias(params, vocab_size, limits.max_logit_bias, bad)
    _check_stop_token_ids(params, vocab_size, limits.max_stop_token_ids, bad)
    return found[:MAX_VIOLATIONS]


def _check_logit_bias(
    params: pb.SamplingParams, vocab_size: int | None, max_entries: int, bad: _Report
) -> None:
    if len(params.logit_bias) > max_entries:
        bad("logit_bias", f"must have at most {max_entries} entries")
        return
    seen: set[int] = set()
    for index, entry in enumerate(params.logit_bias):
        if vocab_size is not None and entry.token_id >= vocab_size:
            bad(f"logit_bias[{index}].token_id", f"must be below the vocabulary size, {vocab_size}")
        if entry.token_id in seen:
            bad(f"logit_bias[{index}].token_id", "is there already")
        seen.add(entry.token_id)
        if not _BIAS_RANGE.holds(entry.bias):
            bad(f"logit_bias[{index}].bias", _BIAS_RANGE.text())


def _check_stop_token_ids(
    params: pb.SamplingParams, vocab_size: int | None, max_entries: int, bad: _Report
) -> None:
    if len(params.stop_token_ids) > max_entries:
        bad("stop_token_ids", f"must have at most {max_entries} entries")
    elif vocab_size is not None:
        for index, token_id in enumerate(params.stop_token_ids):
            if token_id >= vocab_size:
                bad(f"stop_token_ids[{index}]", f"must be below the vocabulary size, {vocab_size}")


def validate_stop(
    stop: Collection[str], *, field: str = "stop", limits: RequestLimits = DEFAULT_LIMITS
) -> list[FieldViolation]:
    """What is wrong with stop strings."""
    max_bytes = limits.max_stop_bytes
    if len(stop) > limits.max_stop_strings:
        return [FieldViolation(field, f"must have at most {limits.max_stop_strings} entries")]
    found = []
    for index, text in enumerate(stop):
        if not text:
            found.append(FieldViolation(f"{field}[{index}]", "must not be empty"))
        elif len(text) > max_bytes or len(text.encode("utf-8", "surrogatepass")) > max_bytes:
            found.append(FieldViolation(f"{field}[{index}]", f"must have at most {max_bytes} bytes"))
    return found


def validate_token_ids(
    token_ids: Collection[int], *, vocab_size: int, field: str, can_be_empty: bool = False
) -> list[FieldViolation]:
    """What is wrong with a list of token ids. An id outside the vocabulary would read outside the
    embedding.
    """
    if not token_ids:
        return [] if can_be_empty else [FieldViolation(field, "must have at least one token")]
    if max(token_ids) < vocab_size:
        return []
    index = next(index for index, token_id in enumerate(token_ids) if token_id >= vocab_size)
    return [FieldViolation(f"{field}[{index}]", f"must be below the vocabulary size, {vocab_size}")]


def validate_length(
    *,
    num_prompt_tokens: int,
    max_tokens: int | None,
    max_model_len: int,
    prompt_field: str = "prompt_token_ids",
    field_prefix: str = "sampling",
) -> list[FieldViolation]:
    """What is wrong with the length of prompt and output together. `max_tokens` None takes what there is
    room for.

    `max_tokens` counts tokens emitted before a resume too.
    """
    if num_prompt_tokens >= max_model_len:
        text = f"has {num_prompt_tokens} tokens; the model takes {max_model_len}, of which one must be output"
        return [FieldViolation(prompt_field, text)]
    if max_tokens is not None and num_prompt_tokens + max_tokens > max_model_len:
        name = f"{field_prefix}.max_tokens" if field_prefix else "max_tokens"
        text = f"{max_tokens} after a prompt of {num_prompt_tokens} is more than the model's {max_model_len}"
        return [FieldViolation(name, text)]
    return []


def validate_labels(
    *, request_id: str = "", priority: int = 0, cache_salt: str = ""
) -> Iterable[FieldViolation]:
    """What is wrong with the fields that steer a request without being part of its prompt."""
    if not _REQUEST_ID.fullmatch(request_id):
        yield FieldViolation("request_id", f"must be at most {MAX_REQUEST_ID_CHARS} of A-Z a-z 0-9 . _ -")
    if abs(priority) > MAX_ABS_PRIORITY:
        yield FieldViolation("priority", f"must be -{MAX_ABS_PRIORITY} to {MAX_ABS_PRIORITY}")
    if len(cache_salt.encode()) > MAX_CACHE_SALT_BYTES:
        yield FieldViolation("cache_salt", f"must have at most {MAX_CACHE_SALT_BYTES} bytes")
