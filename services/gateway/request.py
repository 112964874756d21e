"""A request as it is once every default is resolved, and what its consumers see of it. Data, no behaviour.

Everything that is needed to start a sample again on another engine is here: prompt ids, resolved sampling,
seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from services.gateway.text.assets import ModelAssets
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """What was asked for, with nothing left open.

    `sampling` has seed and max_tokens set and n unset: it goes to the engine as it is. `terminal_ids` are the
    tokens at which the engine ends an output. `deadline` is in seconds of the event loop's clock.
    """

    request_id: str
    info: engine_pb.GetInfoResponse
    assets: ModelAssets
    prompt_token_ids: list[int]
    sampling: pb.SamplingParams
    num_samples: int
    stops: tuple[str, ...]
    terminal_ids: frozenset[int]
    skip_special_tokens: bool
    priority: int
    must_complete: bool
    cache_salt: str
    deadline: float | None
    # Of a session: its name among those of all keys, and how long engines should keep what they computed.
    session_id: str = ""
    retain_seconds: int = 0

    @property
    def seed(self) -> int:
        """The seed in use."""
        return self.sampling.seed


class SampleEnd(NamedTuple):
    """How one sample ended."""

    reason: pb.FinishReason
    stop_string: str
    usage: pb.Usage
    receipt: pb.Receipt


class SampleUpdate(NamedTuple):
    """What is new of one sample. `logprobs` belong to `token_ids`, when asked for. `next_offset` is the
    length in bytes of all text so far.
    """

    sample_index: int
    text: str
    token_ids: list[int]
    logprobs: list[engine_pb.EntryLogprobs]
    next_offset: int
    end: SampleEnd | None
