"""OpenAI's request fields as a GenerateRequest. A field is honoured or refused by name, never ignored.

Range checks are the shared validator's; here are only types, the lengths of lists, which cost before they
are judged, the fields that HTTP spells in its own way, and those whose feature does not exist: they are taken
in their neutral value (`best_of` equal to n, `echo` false, no tools) and refused otherwise. `user`,
`metadata` and `safety_identifier` are labels that change no output by contract; they are taken. null always
means unset.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from services.gateway.http.errors import HttpError, bad_request
from services.gateway.http.prompts import add_messages, prompts_of
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.v1 import gateway_service_pb2 as pb

# /v1/completions has always stopped after 16 tokens unless told otherwise.
COMPLETION_MAX_TOKENS = 16
MAX_LABEL_CHARS = 512
_SAMPLING_INTS = {
    "top_k": 32,
    "seed": 64,
    "min_tokens": 32,
    "n": 32,
    "max_tokens": 32,
}
_SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_ONLY_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "prediction": (),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What was asked for: `common` to all prompts, the `prompts`, and how the answer is to be written. Of a
    chat there are none: its messages are in `common`. `counts_chunks`: each chunk says what its choice has
    used so far.
    """

    common: pb.GenerateRequest
    prompts: list[str | list[int]]
    is_chat: bool
    is_stream: bool
    includes_usage: bool
    counts_chunks: bool
    has_logprobs: bool

    @property
    def num_prompts(self) -> int:
        """How many requests it comes to."""
        return max(1, len(self.prompts))

    def generate(self, index: int) -> pb.GenerateRequest:
        """The request of one prompt. Made when it is its turn: one that is refused is not made many times."""
        if not self.prompts:
            return self.common
        found = pb.GenerateRequest()
        found.CopyFrom(self.common)
        prompt = self.prompts[index]
        if isinstance(prompt, str):
            found.text = prompt
        else:
            found.token_ids.ids.extend(prompt)
        return found


def parse_request(
    document: dict[str, Any], *, is_chat: bool, limits: RequestLimits = DEFAULT_LIMITS
) -> HttpRequest:
    """Read a body. Raises HttpError naming the parameter."""
    fields = {name: value for name, value in document.items() if value is not None}
    request = pb.GenerateRequest()
    taken: set[str] = set()

    def take(name: str) -> Any:
        taken.add(name)
        return fields.get(name)

    request.model = _typed(take("model"), str, "model") or ""
    if is_chat:
        add_messages(request.chat, take("messages"), limits.max_messages)
    prompts = [] if is_chat else prompts_of(take("prompt"), limits.max_prompts)
    _sampling(request, take, limits)
    _lengths(request, take, is_chat)
    has_logprobs = _logprobs(request, take, is_chat)
    request.stop.extend(_stop(take("stop"), limits.max_stop_strings))
    _labels(request, take)
    is_stream = bool(_typed(take("stream"), bool, "stream"))
    includes_usage, counts_chunks = _stream_options(take("stream_options"), is_stream)
    best_of = _integer(take("best_of"), "best_of", 32)
    if best_of is not None and best_of != (request.sampling.n or 1):
        raise bad_request("best_of", "is not supported unless it equals n", code="unsupported_parameter")
    for name, allowed in _ONLY_NEUTRAL.items():
        value = take(name)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise bad_request(name, "is not supported by this server", code="unsupported_parameter")
    unknown = heapq.nsmallest(20, document.keys() - taken)
    if unknown:
        names = ", ".join(name[:64] for name in unknown)
        raise HttpError(400, f"unknown parameter: {names}", param=unknown[0][:64], code="unknown_parameter")
    return HttpRequest(request, prompts, is_chat, is_stream, includes_usage, counts_chunks, has_logprobs)


_Take = Callable[[str], Any]
_Number = TypeVar("_Number", int, float)


def _typed(value: Any, kind: type, name: str) -> Any:
    if value is not None and type(value) is not kind:
        raise bad_request(name, f"must be a {kind.__name__}", code="invalid_type")
    return value


def _integer(value: Any, name: str, bits: int) -> int | None:
    if value is None:
        return None
    if type(value) is not int:
        raise bad_request(name, "must be an integer", code="invalid_type")
    if not 0 <= value < 2**bits:
        raise bad_request(name, f"must be 0 to 2^{bits} - 1", code="invalid_value")
    return int(value)


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float):
        raise bad_request(name, "must be a number", code="invalid_type")
    if abs(value) > 1e30:
        raise bad_request(name, "is out of range", code="invalid_value")
    return float(value)


def _bounded(value: Sized, max_entries: int, name: str) -> None:
    """Refuse a list before anything is made of its entries."""
    if len(value) > max_entries:
        raise bad_request(name, f"must have at most {max_entries} entries")


def _present(value: _Number | None, name: str) -> _Number:
    """null means unset for a parameter; inside of one it means nothing."""
    if value is None:
        raise bad_request(name, "holds a null", code="invalid_value")
    return value


def _sampling(request: pb.GenerateRequest, take: _Take, limits: RequestLimits) -> None:
    sampling = request.sampling
    for name in _SAMPLING_FLOATS:
        number = _number(take(name), name)
        if number is not None:
            setattr(sampling, name, number)
    for name, bits in _SAMPLING_INTS.items():
        integer = _integer(take(name), name, bits)
        if integer is not None:
            setattr(sampling, name, integer)
    ignore_eos = _typed(take("ignore_eos"), bool, "ignore_eos")
    if ignore_eos is not None:
        sampling.ignore_eos = ignore_eos
    stop_ids = _typed(take("stop_token_ids"), list, "stop_token_ids") or []
    _bounded(stop_ids, limits.max_stop_token_ids, "stop_token_ids")
    for token_id in stop_ids:
        sampling.stop_token_ids.append(_present(_integer(token_id, "stop_token_ids", 32), "stop_token_ids"))
    biases = _typed(take("logit_bias"), dict, "logit_bias") or {}
    _bounded(biases, limits.max_logit_bias, "logit_bias")
    for key, value in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < 2**32):
            raise bad_request("logit_bias", "its keys must be token ids", code="invalid_value")
        sampling.logit_bias.add(token_id=int(key), bias=_present(_number(value, "logit_bias"), "logit_bias"))


def _lengths(request: pb.GenerateRequest, take: _Take, is_chat: bool) -> None:
    if not is_chat:
        if not request.sampling.HasField("max_tokens"):
            request.sampling.max_tokens = COMPLETION_MAX_TOKENS
        return
    limit = _integer(take("max_completion_tokens"), "max_completion_tokens", 32)
    if limit is None:
        return
    if request.sampling.HasField("max_tokens") and request.sampling.max_tokens != limit:
        raise bad_request("max_tokens", "differs from max_completion_tokens", code="invalid_value")
    request.sampling.max_tokens = limit


def _logprobs(request: pb.GenerateRequest, take: _Take, is_chat: bool) -> bool:
    wanted, top = take("logprobs"), take("top_logprobs") if is_chat else None
    if not is_chat:
        number = _integer(wanted, "logprobs", 32)
        if number is not None:
            request.sampling.logprobs = number
        return number is not None
    wanted = bool(_typed(wanted, bool, "logprobs"))
    number = _integer(top, "top_logprobs", 32)
    if number is not None and not wanted:
        raise bad_request("top_logprobs", "needs logprobs to be true", code="invalid_value")
    if wanted:
        request.sampling.logprobs = number or 0
    return wanted


def _stop(value: Any, max_strings: int) -> list[str]:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad_request("stop", "must be a string or a list of strings", code="invalid_type")
    _bounded(stops, max_strings, "stop")
    return stops


def _labels(request: pb.GenerateRequest, take: _Take) -> None:
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        label = _typed(take(name), str, name)
        if label is not None and len(label) > MAX_LABEL_CHARS:
            raise bad_request(name, f"must have at most {MAX_LABEL_CHARS} characters", code="invalid_value")
    metadata = _typed(take("metadata"), dict, "metadata") or {}
    if len(metadata) > 16 or any(
        not isinstance(value, str) or len(key) > 64 or len(value) > MAX_LABEL_CHARS
        for key, value in metadata.items()
    ):
        raise bad_request("metadata", "must be at most 16 pairs of short strings", code="invalid_value")
    for name in ("request_id", "cache_salt"):
        text = _typed(take(name), str, name)
        if text is not None:
            setattr(request, name, text)
    priority = _typed(take("priority"), int, "priority")
    if priority is not None:
        if abs(priority) >= 2**31:
            raise bad_request("priority", "is out of range", code="invalid_value")
        request.priority = priority
    skip = _typed(take("skip_special_tokens"), bool, "skip_special_tokens")
    if skip is not None:
        request.skip_special_tokens = skip


def _stream_options(value: Any, is_stream: bool) -> tuple[bool, bool]:
    """Whether usage comes at the end, and with each chunk. The second brings the first, as in vLLM."""
    options = _typed(value, dict, "stream_options")
    if options is None:
        return False, False
    if not is_stream:
        raise bad_request("stream_options", "needs stream to be true", code="invalid_value")
    unknown = set(options) - {"include_usage", "continuous_usage_stats"}
    if unknown:
        raise bad_request(f"stream_options.{min(unknown)[:64]}", "is unknown", code="unknown_parameter")
    at_end = _typed(options.get("include_usage"), bool, "stream_options.include_usage")
    name = "stream_options.continuous_usage_stats"
    with_each = bool(_typed(options.get("continuous_usage_stats"), bool, name))
    if with_each and at_end is False:
        raise bad_request(name, "needs include_usage not to be false", code="invalid_value")
    return bool(at_end) or with_each, with_each
