"""Runs one batch on the runner so that a failure ends the sequence it belongs to and no other.

Knows chunks and the runner; does not know blocks, scheduling, or what becomes of the outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceABC
from typing import Any

from services.engine.core.batch import Chunk, Runner, SampledToken
from services.engine.core.errors import DeviceFault, InternalFailure
from services.engine.core.scheduler import Batch

log = logging.getLogger("weft.engine.core")

Outputs = dict[int, SampledToken | Exception | None]
"""Per chunk, by its place in the batch: the token, None when it draws none, or what went wrong."""


class Executor:
    """The error boundary around one runner. A device fault is nobody's own: it is raised as DeviceFault."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, batch: Batch) -> Outputs:
        """Prepare, copy, forward and sample. If the shared forward fails, each sequence runs alone, once."""
        outputs: Outputs = {}
        ready = [i for i in range(len(batch.chunks)) if self._prepare(i, batch.chunks[i], outputs)]
        try:
            if batch.copies:
                self._runner.copy_blocks(batch.copies)
            if ready:
                outputs.update(self._forward(batch.chunks, ready))
        except Exception as error:
            self._raise_device_fault(error)
            log.warning("shared forward failed; running its %d sequences singly", len(ready), exc_info=error)
            self._run_singly(batch, ready, outputs)
        return outputs

    def _prepare(self, i: int, chunk: Chunk, outputs: Outputs) -> bool:
        try:
            self._runner.prepare(chunk)
        except Exception as error:
            self._raise_device_fault(error)
            outputs[i] = InternalFailure("prepare", error)
            return False
        return True

    def _run_singly(self, batch: Batch, ready: SequenceABC[int], outputs: Outputs) -> None:
        for copy in batch.copies:
            try:
                self._runner.copy_blocks([copy])
            except Exception as error:
                self._raise_device_fault(error)
                owners = (i for i in ready if copy.destination in batch.chunks[i].sequence.block_table)
                outputs.update((i, InternalFailure("copy_blocks", error)) for i in owners)
        for i in ready:
            if i in outputs:
                continue
            try:
                outputs.update(self._forward(batch.chunks, [i]))
            except Exception as error:
                self._raise_device_fault(error)
                outputs[i] = InternalFailure("forward", error)

    def _forward(self, chunks: SequenceABC[Chunk], places: SequenceABC[int]) -> Outputs:
        logits: Any = self._runner.forward([chunks[i] for i in places])
        outputs: Outputs = dict.fromkeys(places)
        sampling = [i for i in places if chunks[i].is_sampling]
        if sampling:
            rows = self._runner.sample(logits, [chunks[i] for i in sampling])
            outputs.update(zip(sampling, rows, strict=True))
        return outputs

    def _raise_device_fault(self, error: Exception) -> None:
        if isinstance(error, DeviceFault):
            raise error
        if self._runner.is_device_fault(error):
            raise DeviceFault(str(error)) from error
