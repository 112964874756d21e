"""What goes out and what comes in, as plain values. Knows no connection."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, str]]"


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one sample, and the tokens that came with it."""

    text: str
    token_ids: tuple[int, ...]
    sample_index: int
    next_offset: int
    logprobs: tuple[pb.DeltaLogprobs, ...] = ()


@dataclass(slots=True)
class Completion:
    """One sample so far. `finish` is set at its end: reason, usage, stop_string."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: pb.Finish | None = None


def make_request(
    prompt: Prompt,
    *,
    model: str = "",
    stop: Sequence[str] = (),
    request_id: str = "",
    resumable: bool = False,
    session_id: str = "",
    priority: int = 0,
    logit_bias: Mapping[int, float] | None = None,
    **sampling: Any,
) -> pb.GenerateRequest:
    """A request from plain values. `prompt`: text, token ids, or messages with "role" and "content".
    `sampling`: the fields of SamplingParams. TypeError for a field that does not exist.
    """
    unknown = sampling.keys() - generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name.keys()
    if unknown:
        raise TypeError(f"no sampling parameter is called {sorted(unknown)[0]!r}")
    if resumable and not request_id:
        request_id = uuid.uuid4().hex
    given = {name: value for name, value in sampling.items() if value is not None}
    request = pb.GenerateRequest(
        model=model,
        sampling=generation_pb2.SamplingParams(**given),
        stop=stop,
        request_id=request_id,
        resumable=resumable,
        session_id=session_id,
        priority=priority,
    )
    for token_id, bias in (logit_bias or {}).items():
        request.sampling.logit_bias.add(token_id=token_id, bias=bias)
    if isinstance(prompt, str):
        request.text = prompt
    elif all(isinstance(item, int) for item in prompt):
        request.token_ids.ids.extend(cast("Sequence[int]", prompt))
    else:
        for message in cast("Sequence[Mapping[str, str]]", prompt):
            request.chat.messages.add(role=message["role"], content=message["content"])
    return request
