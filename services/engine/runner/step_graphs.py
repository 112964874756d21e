"""CUDA graphs of decode steps: one per bucket of batch size and context, captured when first needed.

A decode of n sequences runs in the smallest bucket that holds it; the rows left over are padding. Buckets are
captured lazily, so a start does not wait for graphs nobody uses, and all share one memory pool.

Knows shapes and a function to capture. Does not know the model, nor what the arrays mean.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from services.engine.runner.step_inputs import StepShape

MAX_CAPTURED_BATCH = 256
"""Above it a step's kernels are long enough to hide their own launches."""
_log = logging.getLogger(__name__)


class Graph(Protocol):
    """A captured step: `replay` runs it again on what its inputs hold now, and overwrites `output`."""

    output: Tensor

    def replay(self) -> None:
        """Run it, in stream order."""


class CudaGraph:
    """One captured CUDA graph. `stream` is for captures, the same for all that share a pool."""

    def __init__(self, step: Callable[[], Tensor], pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Kernels compile at their first call, and libraries allocate at their first on a stream, for good
        # (cuBLAS 32 MiB): the one may not happen while capturing, the other not for every graph.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self.output = step()

    def replay(self) -> None:
        """Run it, in stream order."""
        self._graph.replay()


def batch_buckets(max_batch_size: int) -> list[int]:
    """1, 2, 4, then every 8 up to 64, every 16 up to 128, every 32 above; the last is the maximum itself."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, MAX_CAPTURED_BATCH + 1, 32)]
    top = min(max_batch_size, MAX_CAPTURED_BATCH)
    return [*(size for size in sizes if size < top), top]


def width_buckets(max_blocks: int) -> list[int]:
    """Blocks per sequence that a graph provides for: 16, and times 4 up to the longest context. A captured
    grid covers its bucket, and programs beyond a sequence's end cost their launch.
    """
    widths = []
    width = 16
    while width < max_blocks:
        widths.append(width)
        width *= 4
    return [*widths, max_blocks]


def logits_held(max_batch_size: int, max_blocks: int) -> int:
    """Rows of logits that all graphs together keep between replays."""
    return sum(batch_buckets(max_batch_size)) * len(width_buckets(max_blocks))


class StepGraphs:
    """The graphs of one runner. `capture` makes one for a shape."""

    def __init__(self, max_batch_size: int, max_blocks: int, capture: Callable[[StepShape], Graph]) -> None:
        self._batches = batch_buckets(max_batch_size)
        self._widths = width_buckets(max_blocks)
        self._capture = capture
        self._graphs: dict[StepShape, Graph] = {}
        self._is_full = False

    @property
    def num_captured(self) -> int:
        """Graphs that exist."""
        return len(self._graphs)

    def bucket(self, shape: StepShape) -> StepShape | None:
        """The shape to pad a step to, or None when no graph holds it: it prefills, or is too large."""
        is_decode = shape.max_query_len == 1 and shape.num_logits == shape.num_seqs
        if not is_decode or shape.num_seqs > self._batches[-1]:
            return None
        size = self._batches[bisect.bisect_left(self._batches, shape.num_seqs)]
        width = self._widths[bisect.bisect_left(self._widths, shape.table_width)]
        bucket = StepShape(size, size, size, width, 1)
        return None if self._is_full and bucket not in self._graphs else bucket

    def run(self, shape: StepShape) -> Tensor | None:
        """Replay the graph of a bucket, capturing it first if need be; its logits, valid until the next
        replay. None when it cannot be captured: that step, and those of other buckets that have no graph by
        then, run without one. What made it fail shows again there, if it was not the capture's own.
        """
        graph = self._graphs.get(shape)
        if graph is None:
            begin = time.perf_counter()
            try:
                graph = self._graphs[shape] = self._capture(shape)
            except Exception as error:
                is_full = isinstance(error, torch.OutOfMemoryError)
                _log.warning("no more CUDA graphs: %s", error, exc_info=None if is_full else error)
                self._is_full = True
                return None
            _log.info("captured a decode graph: %s in %.2f s", shape, time.perf_counter() - begin)
        graph.replay()
        return graph.output
