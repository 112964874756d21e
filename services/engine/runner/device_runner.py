"""The runner of an accelerator: steps are queued on the device and their tokens fetched later.

`launch` queues copies, forward and sampling without waiting for any of them; `collect` waits for the tokens.
Between the two the host schedules and launches the next step, whose decodes take their tokens from where this
one's sampling puts them. Decode steps replay CUDA graphs.

Knows the model, the cache memory and one stream, on which all runs in order. Knows no scheduling policy
and no transport. One thread calls it. Nothing here needs CUDA but the graphs and the fault test: on a CPU the
same code runs, and is tested, without overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.core.batch import BlockCopy, Chunk, SampledToken
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels.gpu.copy_blocks import copy_blocks
from services.engine.kernels.gpu.gpu_metadata import PLAN_KEY, GpuMetadata
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.models.llama import Llama
from services.engine.runner.config import RunnerInfo
from services.engine.runner.device_sampler import DeviceSampler, PendingTokens
from services.engine.runner.inputs import check_chunk
from services.engine.runner.kv_cache import KVCache
from services.engine.runner.logprobs import MAX_LOGPROBS
from services.engine.runner.step_graphs import CudaGraph, Graph, StepGraphs
from services.engine.runner.step_inputs import StepBuffers, StepInputs, StepShape, fill, shape_of
from services.engine.runner.transfer import send_values

_MOST_CLASSES = 10
"""Rows are told apart by powers of two up to 512: the dequantised linears begin before that."""
_LONG_CONTEXT = 1024
"""Tokens that decode attention splits."""
_ALL_OF_SAMPLING: dict[str, Any] = {
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "logit_bias": ((0, 1.0),),
    "logprobs": MAX_LOGPROBS,
}
"""Every row with all of it: the largest step there can be, to the byte of its buffers."""


@dataclass(slots=True)
class LaunchedStep:
    """A step on its way: over once `event` has passed (None: at once). `pending` is the sampler's; None when
    the step draws no token.
    """

    pending: PendingTokens | None
    event: torch.cuda.Event | None


class DeviceRunner:
    """A loaded model on an accelerator. `load_device_runner` makes one; `info` says what it is."""

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        numerics: Numerics,
        info: RunnerInfo,
        *,
        max_batched_tokens: int,
        max_batch_size: int,
        has_graphs: bool,
    ) -> None:
        self.model = model
        self.cache = cache
        self.numerics = numerics
        self.info = info
        self.device = cache.data.device
        self.has_overlap = self.device.type == "cuda"
        max_blocks = -(-info.max_model_len // cache.block_size)
        largest = StepShape(
            max_batched_tokens + max_batch_size,
            max_batch_size,
            max_batch_size,
            max_blocks,
            max_batched_tokens,
        )
        self._buffers = StepBuffers(largest, self.device)
        self._sampler = DeviceSampler(model.config.vocab_size, max_batch_size, self.device)
        self.graphs = StepGraphs(max_batch_size, max_blocks, self._capture) if has_graphs else None
        self._capture_place: tuple[Any, torch.cuda.Stream] | None = None

    # -- the core's protocol ------------------------------------------------------------

    def prepare(self, chunk: Chunk) -> None:
        """Check one chunk against the cache, the vocabulary and the context length, and its sampling
        parameters.
        """
        info = self.info
        check_chunk(chunk, info.block_size, info.num_blocks, info.vocab_size, info.max_model_len)
        if chunk.is_sampling:
            self._sampler.prepare(chunk.sequence)

    @torch.inference_mode()
    def launch(self, chunks: SequenceABC[Chunk], copies: SequenceABC[BlockCopy] = ()) -> LaunchedStep:
        """Queue one step: copies, forward, sampling. Returns before the device is done."""
        if self.device.type == "cuda":
            # Each thread has a current device of its own, and kernels are launched on that: this thread may
            # not be the one that loaded the model.
            torch.cuda.set_device(self.device)
        if copies:
            self.copy_blocks(copies)
        logits = self.forward(chunks) if chunks else None
        sampling = [chunk for chunk in chunks if chunk.is_sampling]
        pending = None
        if logits is not None and sampling:
            sequences = [chunk.sequence for chunk in sampling]
            offsets = [chunk.output_position for chunk in sampling]
            pending = self._sampler.launch(logits, sequences, offsets, out=self._buffers.drawn)
        return LaunchedStep(pending, self._mark())

    @torch.inference_mode()
    def collect(self, launched: LaunchedStep) -> list[SampledToken | Exception]:
        """Wait for a step, also for one that draws nothing: else prefills would pile up on the device, and
        what they cost would be learned as nothing. One token per chunk that samples, or what went wrong.
        """
        if launched.event is not None:
            launched.event.synchronize()
        return [] if launched.pending is None else self._sampler.collect(launched.pending)

    def copy_blocks(self, copies: SequenceABC[BlockCopy]) -> None:
        """Queue copies of block contents. No block is both a source and a destination in one step."""
        rows = send_values(copies, torch.int32, self.device)
        for stored in (self.cache.data, self.cache.params):
            if stored is not None:
                copy_blocks(stored, rows)

    @torch.inference_mode()
    def forward(self, chunks: SequenceABC[Chunk]) -> Tensor:
        """Queue the forward of one ragged batch; fp32 logits [number of sampling chunks, vocab], valid until
        the next one.
        """
        exact = shape_of(chunks, self.cache.block_size)
        bucket = self.graphs.bucket(exact) if self.graphs is not None else None
        shape = bucket or exact
        host, arrays = self._buffers.stage(shape)
        fill(arrays, chunks, self.cache.block_size, self.cache.scratch_block, self._buffers.num_drawn)
        self._buffers.send(host)
        logits = self.graphs.run(shape) if self.graphs is not None and bucket is not None else None
        if logits is None:
            logits = self._forward(shape, chunks)
        return logits[: exact.num_logits]

    def forget(self, sequence: Sequence) -> None:
        """Drop the sampler's state of a sequence."""
        self._sampler.forget(sequence)

    def is_device_fault(self, error: BaseException) -> bool:
        """Whether the device's context is lost: every later call on it would fail as well."""
        return self.device.type == "cuda" and is_device_fault(
            error, lambda: torch.cuda.synchronize(self.device)
        )

    # -- before serving ------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile every kernel that serving can launch: a compiler at work would hold up all requests. The
        largest step is among what runs. Captures the graphs of one sequence and of a full batch.
        """
        tokens = self._buffers.largest.max_query_len
        sequences = min(self._sampler.max_batch_size, tokens)
        # Linears and attention go by classes of rows, whose limits are powers of two.
        lengths = {min(1 << power, tokens) for power in range(_MOST_CLASSES)}
        for num_rows, num_seqs in (*((n, 1) for n in sorted(lengths)), (sequences, sequences)):
            self.run_dummy(num_rows, num_seqs)
        self.run_dummy(tokens, sequences, **_ALL_OF_SAMPLING)
        if self.graphs is None:
            # A captured decode provides for many splits of its keys; one that is not takes what it needs.
            self.run_dummy(1, 1, start=min(self.info.max_model_len, _LONG_CONTEXT) - 1)
        scratch = self.cache.scratch_block
        self.copy_blocks([BlockCopy(scratch, scratch, 1)])

    def run_dummy(self, num_rows: int, num_seqs: int, *, start: int = 0, **sampling: Any) -> None:
        """Run a step of this many rows, spread over sequences whose blocks are all the scratch block and of
        which `start` tokens are computed; `sampling` are fields of SamplingParams.
        """
        num_seqs = min(num_seqs, num_rows)
        chunks = []
        for index in range(num_seqs):
            rows = num_rows // num_seqs + (index < num_rows % num_seqs)
            end = min(start + rows, self.info.max_model_len)
            params = SamplingParams(max_tokens=1, seed=index, **sampling)
            sequence = Sequence(("dummy", index), [0] * end, params)
            sequence.block_table = [self.cache.scratch_block] * -(-end // self.cache.block_size)
            chunks.append(Chunk(sequence, start, end - start, True))
        try:
            for chunk in chunks:
                self._sampler.prepare(chunk.sequence)
            # The cache may hold anything: rows without a finite logit are none of a warm-up's business.
            self.collect(self.launch(chunks))
        finally:
            for chunk in chunks:
                self.forget(chunk.sequence)

    # -- the step ------------------------------------------------------------

    def _forward(self, shape: StepShape, chunks: SequenceABC[Chunk] = ()) -> Tensor:
        """The model over the device's arrays of one shape."""
        inputs = self._buffers.views(shape)
        token_ids = inputs.token_ids.index_select(0, inputs.input_index)
        return self.model.forward(
            token_ids, self._metadata(inputs, shape, chunks), self.cache.layers, inputs.logits_rows
        )

    def _metadata(
        self, inputs: StepInputs, shape: StepShape, chunks: SequenceABC[Chunk]
    ) -> AttentionMetadata:
        """What attention sees of the step: bounds on the host, lengths on the device."""
        plan = GpuMetadata(
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            block_tables=inputs.block_tables,
            max_query_len=shape.max_query_len,
            max_context=shape.table_width * self.cache.block_size,
        )
        lengths = [chunk.length for chunk in chunks]
        contexts = [chunk.start + chunk.length for chunk in chunks]
        return AttentionMetadata(
            inputs.positions,
            inputs.slot_mapping,
            inputs.block_tables,
            lengths,
            contexts,
            self.cache.block_size,
            shape.num_rows - sum(lengths),
            {PLAN_KEY: plan},
        )

    def _capture(self, shape: StepShape) -> Graph:
        if self._capture_place is None:
            self._capture_place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        return CudaGraph(lambda: self._forward(shape), *self._capture_place)

    def _mark(self) -> torch.cuda.Event | None:
        """An event behind all that is queued."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def is_device_fault(error: BaseException, synchronize: Callable[[], None]) -> bool:
    """Whether the CUDA context is beyond repair after an error.

    The device is asked, because the error does not tell: a refused launch or capture passes, a fault in a
    kernel is reported by every later call, and each library words both in its own way.
    """
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    try:
        synchronize()
    except RuntimeError:
        return True
    return False
