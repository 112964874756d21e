"""Whole blocks on workers, several at a time: the way of a run without error propagation.

Each block then sees what the full-precision blocks before it give, so this process takes the calibration
stream ahead through the source alone and sends each block away with its input; what comes back is taken in
the order of the blocks. As many blocks are on their way as there are workers. This module does not know how
a block is quantized, nor where its results are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.quantizer.quantize import BlockQuantizer, QuantizedBlock
from services.quantizer.source import Source, Weights
from services.quantizer.workers import WorkerPool


@dataclass(frozen=True, slots=True)
class Headers:
    """A checkpoint without its tensors: a worker gets those that it needs with the task, so that the
    checkpoint need not be within its reach.
    """

    directory: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def of(cls, source: Source) -> Headers:
        """What `source` knows of its tensors."""
        checkpoint = source.checkpoint
        names = sorted(checkpoint.names)
        return cls(
            checkpoint.directory,
            checkpoint.config,
            {name: tuple(checkpoint.shape(name)) for name in names},
            {name: checkpoint.dtype(name) for name in names},
        )

    @property
    def names(self) -> frozenset[str]:
        """See ReadableCheckpoint."""
        return frozenset(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See ReadableCheckpoint."""
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        """See ReadableCheckpoint."""
        return self.dtypes[name]

    def load(self, name: str) -> Tensor:
        """Never: raises LookupError."""
        raise LookupError(f"tensor {name} did not come with the task")


@dataclass(frozen=True, slots=True)
class BlockTask:
    """One block: its weights fp32, and its input `hidden` [windows, length, hidden_size]."""

    headers: Headers
    index: int
    weights: Weights
    hidden: Tensor
    group_size: int
    skipped: frozenset[str]
    method: str


def quantize_block(task: BlockTask) -> QuantizedBlock:
    """On the device on which the weights are."""
    device = next(iter(task.weights.values())).device
    source = Source(task.headers.directory, device, task.headers)
    return BlockQuantizer(
        source,
        task.index,
        task.weights,
        task.hidden,
        task.group_size,
        set(task.skipped),
        method=task.method,
    ).run()


class BlocksAhead:
    """Iterates over the quantized blocks from `first` on, each with the calibration stream behind it.

    `calibration` is the stream before block `first`; it is not written to.
    """

    def __init__(
        self,
        pool: WorkerPool,
        source: Source,
        calibration: Tensor,
        *,
        first: int,
        group_size: int,
        skipped: set[str],
        method: str,
    ) -> None:
        self._source, self._hidden, self._first = source, calibration, first
        self._group_size, self._skipped, self._method = group_size, frozenset(skipped), method
        self._headers = Headers.of(source)
        self._behind: deque[Tensor] = deque()
        self._blocks = pool.stream(quantize_block, self._tasks())

    def __iter__(self) -> Iterator[tuple[QuantizedBlock, Tensor]]:
        for block in self._blocks:
            yield block, self._behind.popleft()

    def _tasks(self) -> Iterator[BlockTask]:
        for index in range(self._first, self._source.num_blocks):
            # Not a local: what has been handed out is not to be kept alive here.
            yield self._task(index)

    def _task(self, index: int) -> BlockTask:
        weights, hidden = self._source.block_weights(index), self._hidden
        if index + 1 < self._source.num_blocks:
            with torch.inference_mode():  # a generator takes its consumer's mode, which may be anything
                self._hidden = self._source.run_block(self._source.block(index), weights, hidden)
        self._behind.append(self._hidden)
        return BlockTask(self._headers, index, weights, hidden, self._group_size, self._skipped, self._method)
