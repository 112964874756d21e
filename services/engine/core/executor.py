"""Runs batches on the runner so that a failure ends the sequence it belongs to and no other.

Knows chunks and the runner; does not know blocks, scheduling, or what becomes of the outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Any

from services.engine.core.batch import Batch, BlockCopy, Chunk, Runner, SampledToken
from services.engine.core.errors import DeviceFault, InternalFailure
from services.engine.core.sequence import SequenceStatus

log = logging.getLogger("weft.engine.core")

Output = SampledToken | Exception | None
"""What became of a chunk: the token, None when it draws none or gave up its blocks, or what went wrong."""


@dataclass(slots=True)
class Step:
    """A batch that was launched. `error`: why what the runner has of it counts for nothing."""

    batch: Batch
    started_at: float
    launched: Any = None
    error: Exception | None = None


class Executor:
    """The error boundary around one runner. A device fault is nobody's own: it is raised as DeviceFault."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def prepare(self, batch: Batch) -> list[tuple[Chunk, InternalFailure]]:
        """Prepare every chunk that needs it. Those that fail are taken out of the batch and returned."""
        failed: list[tuple[Chunk, InternalFailure]] = []
        for chunk in batch.chunks:
            if chunk.input_row is None:
                try:
                    self._runner.prepare(chunk)
                except Exception as error:
                    self._raise_device_fault(error)
                    failed.append((chunk, InternalFailure("prepare", error)))
        for chunk, _ in failed:
            batch.drop(chunk)
        return failed

    def launch(self, batch: Batch, now: float) -> Step:
        """Start a step. A failure to do so is kept for `collect`."""
        step = Step(batch, now)
        try:
            step.launched = self._runner.launch(batch.chunks, batch.copies)
        except Exception as error:
            self._raise_device_fault(error)
            step.error = error
        return step

    def collect(self, step: Step, following: Step | None) -> SequenceABC[Output]:
        """Wait for a step; its outputs, chunk by chunk. If the step failed, each of its sequences runs alone,
        once, and the step launched on top of it is void: it will run so, too.
        """
        batch = step.batch
        rows = self._wait(step)
        if step.error is None and len(rows) != batch.num_sampling:
            step.error = ValueError(f"{len(rows)} rows for {batch.num_sampling} chunks that sample")
        if step.error is None:
            if batch.num_sampling == len(batch.chunks):
                return rows
            each = iter(rows)
            return [next(each) if chunk.is_sampling else None for chunk in batch.chunks]
        log.warning(
            "shared forward failed; running its %d sequences singly", len(batch.chunks), exc_info=step.error
        )
        if following is not None and following.error is None:
            self._wait(following)
            following.error = following.error or step.error
        return [self._run_alone(chunk, batch.copies) for chunk in batch.chunks]

    def _wait(self, step: Step) -> SequenceABC[SampledToken | Exception]:
        """The rows of a step, or none and its `error` set."""
        if step.error is not None:
            return []
        try:
            return self._runner.collect(step.launched)
        except Exception as error:
            self._raise_device_fault(error)
            step.error = error
            return []

    def _run_alone(self, chunk: Chunk, copies: SequenceABC[BlockCopy]) -> Output:
        """Launch one chunk and wait for it. By now the host knows all of its tokens."""
        sequence = chunk.sequence
        own = [copy for copy in copies if copy.destination in sequence.block_table]
        chunk.input_row = None
        try:
            self._runner.forget(sequence)
            if sequence.status is not SequenceStatus.RUNNING:
                return None  # It has ended, or lost its blocks: there is nothing to compute it from.
            self._runner.prepare(chunk)
            rows = self._runner.collect(self._runner.launch([chunk], own))
            return rows[0] if chunk.is_sampling else None
        except Exception as error:
            self._raise_device_fault(error)
            return InternalFailure("forward", error)

    def _raise_device_fault(self, error: Exception) -> None:
        if isinstance(error, DeviceFault):
            raise error
        if self._runner.is_device_fault(error):
            raise DeviceFault(str(error)) from error
