"""What one step computes, and the door to whatever computes it.

Knows no tensors: logits are opaque here.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

from services.engine.core.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + length) of one sequence, computed in one step.

    K and V of every token before `start` are in the sequence's blocks by the time the step runs; blocks for
    these tokens are allocated. `is_sampling`: the last token of the chunk is the sequence's newest, so its
    logits row is sampled. `input_row`: the host does not know the chunk's last token yet. It is the one drawn
    in that row of the step launched just before; rows count the chunks of a step that sample.
    """

    sequence: Sequence
    start: int
    length: int
    is_sampling: bool
    input_row: int | None = None

    @property
    def output_position(self) -> int:
        """The place in the completion of the token that this chunk draws, counted from 0.

        Holds with a token in flight, too, when `sequence.num_output_tokens` is still one less.
        """
        return self.start + self.length - len(self.sequence.prompt_token_ids)


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


@dataclass(slots=True)
class Batch:
    """One step's work: chunks to compute, of which `num_sampling` draw a token, copies to do before,
    sequences that lost their blocks for it.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    num_sampling: int = 0

    def add(self, sequence: Sequence, length: int) -> None:
        """Schedule the next `length` tokens of a sequence, whose last is known to the host."""
        start = sequence.num_scheduled_tokens
        end = sequence.num_scheduled_tokens = start + length
        is_sampling = end == sequence.num_foreseen_tokens
        self.chunks.append(Chunk(sequence, start, length, is_sampling))
        if is_sampling:
            sequence.drawn_row = self.num_sampling
            self.num_sampling += 1
            if end < sequence.max_foreseen_tokens:
                sequence.num_foreseen_tokens = end + 1

    def drop(self, chunk: Chunk) -> None:
        """Take a chunk out. The rows of those behind it move up."""
        self.chunks.remove(chunk)
        self.num_tokens -= chunk.length
        sampling = [other for other in self.chunks if other.is_sampling]
        self.num_sampling = len(sampling)
        for row, other in enumerate(sampling):
            other.sequence.drawn_row = row


class Runner(Protocol):
    """Whatever runs the model. One thread calls it.

    Steps run in the order of their launches, each as if it began when the one before had ended (on a device:
    one stream). With `has_overlap` off, `launch` computes at once and every launch is collected before the
    next; with it on, at most two steps are launched and not collected.
    """

    has_overlap: bool

    def prepare(self, chunk: Chunk) -> None:
        """Get one chunk ready. An exception ends that sequence alone.

        Not called for a chunk with an `input_row`: the sequence's chunk before it was prepared.
        """

    def launch(self, chunks: SequenceABC[Chunk], copies: SequenceABC[BlockCopy]) -> Any:
        """Start one step: the copies, then the forward of one mixed ragged batch, then sampling.

        May return before the device is done, with whatever `collect` needs. All that is wanted of the chunks
        and their sequences has been read by then: the core changes both, and a decode's chunk serves again
        the step after next. If it raises, the step counts as not having run, and its sequences are launched
        again, one at a time.
        """

    def collect(self, launched: Any) -> list[SampledToken | Exception]:
        """Wait for a launched step, the oldest first, without holding the interpreter up.

        Returns when the step is over, even if it draws no token: its time is measured, and what is launched
        ahead is bounded. One token per sampling chunk, in row order; a row's failure is returned in its
        place. An exception concerns the whole step: its sequences are launched again, one at a time.
        """

    def forget(self, sequence: Sequence) -> None:
        """Drop what is held for a sequence. May come twice, and while a launched step still computes it.

        A sequence of a failed step is forgotten before it is prepared and launched again: whatever the runner
        counts from draws is to be made anew then from the sequence's own tokens.
        """

    def is_device_fault(self, error: BaseException) -> bool:
        """Whether the device is beyond repair after this error."""


class ForwardRunner(Protocol):
    """A runner that computes while the caller waits: forward and sampling are two calls."""

    def prepare(self, chunk: Chunk) -> None:
        """As in `Runner`."""

    def copy_blocks(self, copies: SequenceABC[BlockCopy]) -> None:
        """Do the copies, before the forward of the same step."""

    def forward(self, chunks: SequenceABC[Chunk]) -> Any:
        """Run one mixed ragged batch. Row i of the result belongs to the i-th chunk that samples."""

    def sample(self, logits: Any, chunks: SequenceABC[Chunk]) -> list[SampledToken | Exception]:
        """Draw one token per sampling chunk, in row order. A row's failure is returned in its place."""

    def forget(self, sequence: Sequence) -> None:
        """As in `Runner`."""

    def is_device_fault(self, error: BaseException) -> bool:
        """As in `Runner`."""


class SerialRunner:
    """A `ForwardRunner` as a `Runner` without overlap."""

    has_overlap = False

    def __init__(self, runner: ForwardRunner) -> None:
        self._runner = runner

    def prepare(self, chunk: Chunk) -> None:
        """Handed on."""
        self._runner.prepare(chunk)

    def launch(
        self, chunks: SequenceABC[Chunk], copies: SequenceABC[BlockCopy]
    ) -> list[SampledToken | Exception]:
        """Compute the step; what is returned is its tokens."""
        if copies:
            self._runner.copy_blocks(copies)
        if not chunks:
            return []
        logits = self._runner.forward(chunks)
        sampling = [chunk for chunk in chunks if chunk.is_sampling]
        return self._runner.sample(logits, sampling) if sampling else []

    def collect(self, launched: list[SampledToken | Exception]) -> list[SampledToken | Exception]:
        """The tokens, at once."""
        return launched

    def forget(self, sequence: Sequence) -> None:
        """Handed on."""
        self._runner.forget(sequence)

    def is_device_fault(self, error: BaseException) -> bool:
        """Handed on."""
        return self._runner.is_device_fault(error)


def as_runner(runner: Runner | ForwardRunner) -> Runner:
    """The same runner if it launches and collects, else one around it that does."""
    if hasattr(runner, "launch"):
        return cast("Runner", runner)
    return SerialRunner(runner)
