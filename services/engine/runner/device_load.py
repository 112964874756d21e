"""Loads a model onto an accelerator: dtype, memory measured rather than guessed, self-test, canary, warm-up.

The order matters. Weights are refused before they are loaded when they cannot fit; what else an engine takes
is measured by running the largest step there can be; what is then left becomes the KV cache. Knows CUDA's
memory counters and nothing of kernels. On a CPU (tests, and a dry run of the device lane) the same path sizes
the cache as the plain runner does.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from services.engine.kernels.kv_format import KVFormat
from services.engine.kernels.numerics import Numerics
from services.engine.models.llama import Llama
from services.engine.models.loader import load_model, read_model_config, resolve_max_model_len
from services.engine.runner.canary import replay_canary
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from services.engine.runner.device_runner import DeviceRunner
from services.engine.runner.kv_cache import KVCache, choose_kv_format, kv_bytes_per_token, resolve_num_blocks
from services.engine.runner.load import make_info, weight_bytes
from services.engine.runner.memory_budget import (
    MemoryBudget,
    MemoryUse,
    blocks_that_fit,
    check_cache,
    check_weights,
    graph_bytes,
    resolve_limit,
)
from services.engine.runner.self_test import settle_numerics
from services.engine.runner.source import Source, open_source
from services.engine.runner.step_graphs import logits_held
from weft.artifact.checkpoint import Checkpoint

MIN_CAPABILITY = (8, 0)
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 256
_DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_BYTES = {"I32": 4, "I64": 8, "F32": 4, "F64": 8, "F16": 2, "BF16": 2}
_FLOATS = ("F16", "BF16", "F32", "F64")
_log = logging.getLogger(__name__)


def load_device_runner(config: RunnerConfig) -> DeviceRunner:
    """Load a model, test it, warm its kernels up, and make its runner.

    Raises RunnerConfigError (a setting, a device that is not there, a model that does not fit), ConfigError
    or CheckpointError (the model directory), ArtifactError (the store; DigestMismatch, CanaryError).
    """
    device = open_device(config.device)
    try:
        return _load(config, device)
    except torch.OutOfMemoryError as error:
        raise RunnerConfigError(
            f"device {config.device} ran out of memory while the model was loaded: {error}"
        ) from error


def check_head_dim(head_dim: int) -> None:
    """Raises RunnerConfigError for heads that no kernel takes."""
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        raise RunnerConfigError(
            f"head_dim {head_dim} has no kernels on a GPU (multiples of {HEAD_DIM_MULTIPLE} up to "
            f"{MAX_HEAD_DIM} have)"
        )


def _load(config: RunnerConfig, device: torch.device) -> DeviceRunner:
    source = open_source(config)
    model_config = read_model_config(source.checkpoint)
    if device.type == "cuda":
        check_head_dim(model_config.head_dim)
    numerics = Numerics(_DTYPES[config.dtype], bool(config.is_deterministic), device=device)
    max_model_len = resolve_max_model_len(model_config, config.max_model_len)
    budget = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = resolve_limit(config.gpu_memory, total, free)
        check_weights(budget, least_weight_bytes(source.checkpoint, numerics.dtype))
    kv_format = choose_kv_format(config, model_config, numerics.dtype)
    if kv_format.storage.itemsize > numerics.dtype.itemsize:
        raise RunnerConfigError(
            f"kv_dtype {kv_format.name} is wider than the activations ({numerics.dtype}): take dtype float32"
        )
    model = load_model(
        source.checkpoint,
        model_config,
        numerics,
        max_model_len,
        is_artifact=source.is_artifact,
        balances_keys=kv_format.max_code is not None,
    )
    loading = _Loading(config, source, model, numerics, kv_format, max_model_len)
    return loading.finish(loading.num_blocks(budget))


def open_device(name: str) -> torch.device:
    """The device of a name such as "cuda" or "cuda:1", made current. Raises RunnerConfigError."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunnerConfigError(f"device {name!r} is not supported (there are: cpu, cuda)") from None
    if name == "cpu":
        return device
    if device.type != "cuda":
        raise RunnerConfigError(f"device {name!r} is not supported (there are: cpu, cuda)")
    if not torch.cuda.is_available():
        raise RunnerConfigError("device cuda: torch sees no CUDA device here")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise RunnerConfigError(f"device cuda:{index}: there are {torch.cuda.device_count()} CUDA devices")
    if torch.cuda.get_device_capability(index) < MIN_CAPABILITY:
        raise RunnerConfigError(
            f"device cuda:{index} has compute capability {torch.cuda.get_device_capability(index)}, "
            f"{MIN_CAPABILITY} is needed"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def least_weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes that all tensors take on the device at least: packed words as stored, floating-point numbers as
    wide as `dtype` if they are not narrower.
    """
    total = 0
    for name in checkpoint.names:
        stored = checkpoint.dtype(name)
        width = _BYTES.get(stored, 1)
        if stored in _FLOATS:
            width = min(width, dtype.itemsize)
        total += math.prod(checkpoint.shape(name)) * width
    return total


class _Loading:
    """A model that is loaded and has no cache yet."""

    def __init__(
        self,
        config: RunnerConfig,
        source: Source,
        model: Llama,
        numerics: Numerics,
        kv_format: KVFormat,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.source = source
        self.model = model
        self.numerics = numerics
        self.kv_format = kv_format
        self.max_model_len = max_model_len

    def num_blocks(self, budget: MemoryBudget | None) -> int:
        """Blocks of the cache: as told, or as many as fit. Raises RunnerConfigError."""
        config = self.config
        bytes_per_token = kv_bytes_per_token(self.model.config, self.kv_format)
        block_bytes = bytes_per_token * config.block_size
        is_told = config.num_blocks is not None or config.kv_memory_bytes is not None
        if budget is None:
            return resolve_num_blocks(config, bytes_per_token, self.max_model_len)
        use = self._measure(budget)
        if is_told:
            blocks = resolve_num_blocks(config, bytes_per_token, self.max_model_len)
            # Graphs get what is left: without any, decodes are slower and no less right.
            use = replace(use, graphs=0)
            if config.gpu_memory is None:
                budget = replace(budget, limit=budget.free)
            check_cache(budget, use, (blocks + 1) * block_bytes)
        else:
            blocks_each = -(-self.max_model_len // config.block_size)
            blocks = blocks_that_fit(budget, use, block_bytes, blocks_each)
        _log.info("%d blocks of the KV cache take %d bytes; %s", blocks, (blocks + 1) * block_bytes, use)
        return blocks

    def finish(self, num_blocks: int) -> DeviceRunner:
        """Allocate the cache, test what is loaded, and warm up."""
        config = self.config
        cache = self._cache(num_blocks)
        numerics, fingerprint = settle_numerics(self.model, cache, self.numerics, self.max_model_len, config)
        if self.source.canary is not None:
            replay_canary(self.source.canary, self.model, cache, numerics.dtype, self.max_model_len)
        elif self.source.is_artifact:
            _log.warning("the artifact has no canary: that it was loaded right is not shown")
        has_graphs = config.has_graphs and numerics.device.type == "cuda"
        runner = self._runner(cache, numerics, fingerprint, has_graphs=has_graphs)
        runner.warm_up()
        cache.reset(is_poisoned=config.is_poisoned)
        return runner

    def _measure(self, budget: MemoryBudget) -> MemoryUse:
        """What everything but the cache takes. All that a warm engine holds is counted as activations if it
        is no weight: tables, buffers, scratch, and, outside of torch's allocator, the code of kernels.
        """
        config, device = self.config, self.numerics.device
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        cache = self._cache(1)
        # Without graphs: a graph's memory is not in the peak, and what it refers to is freed late.
        runner = self._runner(cache, self.numerics, "", has_graphs=False)
        runner.warm_up()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - cache.num_bytes
        free, _ = torch.cuda.mem_get_info(device)
        outside = max(0, budget.free - free - torch.cuda.memory_reserved(device))
        del runner, cache
        torch.cuda.empty_cache()
        weights = weight_bytes(self.model)
        graphs = 0
        if config.has_graphs:
            blocks_each = -(-self.max_model_len // config.block_size)
            rows = logits_held(config.max_batch_size, blocks_each)
            graphs = graph_bytes(self.model.config.vocab_size, rows)
        return MemoryUse(weights, peak - weights + outside, graphs)

    def _cache(self, num_blocks: int) -> KVCache:
        return KVCache(
            self.model.config,
            num_blocks,
            self.config.block_size,
            self.kv_format,
            device=self.numerics.device,
            is_poisoned=self.config.is_poisoned,
        )

    def _runner(
        self, cache: KVCache, numerics: Numerics, fingerprint: str, *, has_graphs: bool
    ) -> DeviceRunner:
        config = self.config
        info = make_info(
            config, self.source, self.model, cache, numerics, self.max_model_len, fingerprint, None
        )
        return DeviceRunner(
            self.model,
            cache,
            numerics,
            info,
            max_batched_tokens=config.max_batched_tokens,
            max_batch_size=config.max_batch_size,
            has_graphs=has_graphs,
        )
