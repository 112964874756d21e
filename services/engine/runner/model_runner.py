"""The runner: holds the model and the cache memory, computes batches and draws tokens for the core.

Implements `services.engine.core.batch.Runner`. Knows no request, no scheduling policy and no transport. One
thread calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceABC
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.engine.core.batch import BlockCopy, Chunk, SampledToken
from services.engine.core.sequence import Sequence
from services.engine.kernels.numerics import Numerics
from services.engine.models.llama import Llama
from services.engine.models.loader import load_model, read_model_config, resolve_max_model_len
from services.engine.runner.canary import replay_canary
from services.engine.runner.config import RunnerConfig, RunnerInfo
from services.engine.runner.crossover import set_crossover
from services.engine.runner.inputs import check_chunk, make_inputs
from services.engine.runner.kv_cache import KVCache, choose_kv_format, kv_bytes_per_token, resolve_num_blocks
from services.engine.runner.load import choose_numerics, is_head_quantized, make_info
from services.engine.runner.sampler import Sampler
from services.engine.runner.self_test import settle_numerics
from services.engine.runner.source import Source, open_source

if TYPE_CHECKING:
    from services.engine.runner.device_runner import DeviceRunner

_log = logging.getLogger(__name__)


class ModelRunner:
    """A loaded model on one device. `load_runner` makes one; `info` says what it is."""

    def __init__(self, model: Llama, cache: KVCache, numerics: Numerics, info: RunnerInfo) -> None:
        self.model = model
        self.cache = cache
        self.numerics = numerics
        self.info = info
        self._sampler = Sampler(model.config.vocab_size)
        self._row_tile = numerics.row_tile if numerics.is_deterministic else 1

    def prepare(self, chunk: Chunk) -> None:
        """Check one chunk against the cache, the vocabulary and the context length, and its sampling
        parameters.
        """
        info = self.info
        check_chunk(chunk, info.block_size, info.num_blocks, info.vocab_size, info.max_model_len)
        if chunk.is_sampling:
            self._sampler.prepare(chunk.sequence)

    def copy_blocks(self, copies: SequenceABC[BlockCopy]) -> None:
        """Copy block contents, before the forward of the same step."""
        self.cache.copy_blocks(copies)

    @torch.inference_mode()
    def forward(self, chunks: SequenceABC[Chunk]) -> Tensor:
        """Compute one ragged batch; fp32 logits [number of sampling chunks, vocab]."""
        if not chunks:
            return torch.empty(0, self.info.vocab_size)
        inputs = make_inputs(chunks, self.cache.block_size, self.cache.scratch_block, self._row_tile)
        logits = self.model.forward(inputs.token_ids, inputs.metadata, self.cache.layers, inputs.logits_rows)
        return logits[: inputs.num_logits]

    @torch.inference_mode()
    def sample(self, logits: Tensor, chunks: SequenceABC[Chunk]) -> list[SampledToken | Exception]:
        """One token per row, or the exception that ends that row's sequence."""
        return self._sampler.sample(logits, [chunk.sequence for chunk in chunks])

    def forget(self, sequence: Sequence) -> None:
        """Drop the sampler's state of a sequence."""
        self._sampler.forget(sequence)

    def is_device_fault(self, error: BaseException) -> bool:
        """Never on a CPU: no error there outlives the call that raised it."""
        return False


def load_runner(config: RunnerConfig) -> ModelRunner | DeviceRunner:
    """Load a model, test it, and make its runner.

    Sets torch's thread count for the whole process when `num_threads` is given. Raises RunnerConfigError (a
    setting), ConfigError or CheckpointError (the model directory), ArtifactError (the store; DigestMismatch,
    CanaryError).
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.device != "cpu":
        # Imports Triton, which a CPU does without.
        from services.engine.runner.device_load import load_device_runner

        return load_device_runner(config)
    return load_from(open_source(config), config)


def load_from(source: Source, config: RunnerConfig) -> ModelRunner:
    """`load_runner` on the CPU, of a source that is open already."""
    model_config = read_model_config(source.checkpoint)
    numerics = choose_numerics(config, model_config)
    max_model_len = resolve_max_model_len(model_config, config.max_model_len)
    kv_format = choose_kv_format(config, model_config, numerics.dtype)
    model = load_model(
        source.checkpoint,
        model_config,
        numerics,
        max_model_len,
        is_artifact=source.is_artifact,
        balances_keys=kv_format.max_code is not None,
        quantizes_head=is_head_quantized(config, model_config),
    )
    crossover_rows = set_crossover(model.linears.values(), source.digest, config.cache_dir)
    num_blocks = resolve_num_blocks(config, kv_bytes_per_token(model_config, kv_format), max_model_len)
    cache = KVCache(model_config, num_blocks, config.block_size, kv_format, is_poisoned=config.is_poisoned)
    numerics, fingerprint = settle_numerics(model, cache, numerics, max_model_len, config)
    if source.canary is not None:
        replay_canary(source.canary, model, cache, numerics.dtype, max_model_len)
    elif source.is_artifact:
        _log.warning("the artifact has no canary: that it was loaded right is not shown")
    info = make_info(config, source, model, cache, numerics, max_model_len, fingerprint, crossover_rows)
    cache.reset(is_poisoned=config.is_poisoned)
    return ModelRunner(model, cache, numerics, info)
