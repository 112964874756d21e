"""What one step computes, and the door to whatever computes it.

Knows no tensors: logits are opaque here.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from services.engine.core.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + length) of one sequence, computed in one step.

    K and V of every token before `start` are in the sequence's blocks already; blocks for these tokens are
    allocated. `is_sampling`: the last token of the chunk is the sequence's newest, so its logits row is
    sampled.
    """

    sequence: Sequence
    start: int
    length: int
    is_sampling: bool


class BlockCopy(NamedTuple):
    """Copy the first `num_tokens` slots of K and V, in all layers, from one block to another."""

    source: int
    destination: int
    num_tokens: int


class SampledToken(NamedTuple):
    """One drawn token. `logprob` and `top_logprobs` (id, logprob), likeliest first, are set if asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Runner(Protocol):
    """Whatever runs the model. One thread calls it."""

    def prepare(self, chunk: Chunk) -> None:
        """Get one chunk ready. An exception ends that sequence alone."""

    def copy_blocks(self, copies: SequenceABC[BlockCopy]) -> None:
        """Do the copies, before the forward of the same step."""

    def forward(self, chunks: SequenceABC[Chunk]) -> Any:
        """Run one mixed ragged batch. Row i of the result belongs to the i-th chunk that samples."""

    def sample(self, logits: Any, chunks: SequenceABC[Chunk]) -> list[SampledToken | Exception]:
        """Draw one token per sampling chunk, in row order. A row's failure is returned in its place."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is held for a sequence. May come twice."""

    def is_device_fault(self, error: BaseException) -> bool:
        """Whether the device is beyond repair after this error."""
