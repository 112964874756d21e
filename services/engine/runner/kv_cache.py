"""The memory behind the blocks: K and V of all layers, in one format. Does not know who owns a block."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from services.engine.core.batch import BlockCopy
from services.engine.kernels.kv_format import FORMATS, KVFormat, LayerCache
from services.engine.models.config import ModelConfig
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from weft import memory

DEFAULT_KV_BYTES = 1 << 30
_POISON_PARAMS = 0x7FC07FC0  # two bfloat16 NaNs
_log = logging.getLogger(__name__)


def choose_kv_format(config: RunnerConfig, model: ModelConfig, dtype: torch.dtype) -> KVFormat:
    """The format asked for; "auto" is the activations' dtype. Raises RunnerConfigError when it cannot hold
    the model's heads.
    """
    name = str(dtype).removeprefix("torch.") if config.kv_dtype == "auto" else config.kv_dtype
    kv_format = FORMATS[name]
    if model.head_dim % kv_format.values_per_unit:
        raise RunnerConfigError(f"kv_dtype {name} needs an even head_dim, the model has {model.head_dim}")
    return kv_format


def kv_bytes_per_token(config: ModelConfig, kv_format: KVFormat) -> int:
    """Bytes of K and V that one token takes in all layers, scales and minima included."""
    return memory.kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, kv_format.name)


def resolve_num_blocks(config: RunnerConfig, bytes_per_token: int, max_model_len: int) -> int:
    """How many blocks sequences can own; one more, the scratch block, is allocated within the same memory.
    Raises RunnerConfigError when not even one fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    block_bytes = bytes_per_token * config.block_size
    if config.kv_memory_bytes is not None:
        fitting = config.kv_memory_bytes // block_bytes - 1
        if fitting < 1:
            raise RunnerConfigError(
                f"kv_memory_bytes {config.kv_memory_bytes} is less than one block and a scratch block "
                f"({block_bytes} bytes each)"
            )
        return fitting
    per_sequence = -(-max_model_len // config.block_size)
    fitting = max(1, min(per_sequence * config.max_batch_size, DEFAULT_KV_BYTES // block_bytes - 1))
    if fitting < per_sequence:
        tokens = fitting * config.block_size
        _log.warning(
            "the default KV cache holds %d tokens, one sequence %d: give more memory", tokens, max_model_len
        )
    return fitting


class KVCache:
    """All layers' K and V; block `scratch_block` is nobody's.

    `data` [layers, 2, num_blocks + 1, kv_heads, block_size, row_size] of the format's storage type; `params`
    int32 [layers, 2, num_blocks + 1, kv_heads, block_size] of a quantised format, else None. `layers[i]` is
    layer i's view of both.

    Contents of a block that no sequence has written are meaningless; `is_poisoned` makes them NaN, so that a
    read of one shows.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        kv_format: KVFormat,
        *,
        device: str = "cpu",
        is_poisoned: bool = False,
    ) -> None:
        slots = (config.num_layers, 2, num_blocks + 1, config.num_kv_heads, block_size)
        self.params: Tensor | None = None
        try:
            self.data = torch.zeros(
                (*slots, kv_format.row_size(config.head_dim)), dtype=kv_format.storage, device=device
            )
            if kv_format.is_quantized:
                self.params = torch.zeros(slots, dtype=torch.int32, device=device)
        except RuntimeError as error:
            raise RunnerConfigError(
                f"no memory for {num_blocks} blocks of {block_size} tokens: {error}"
            ) from error
        self.kv_format = kv_format
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scratch_block = num_blocks
        self.layers = [self._layer(index) for index in range(config.num_layers)]
        self.reset(is_poisoned=is_poisoned)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, the scratch block included."""
        return self.data.nbytes + (0 if self.params is None else self.params.nbytes)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.data.device

    def layer(self, index: int) -> LayerCache:
        """One layer's K and V."""
        return self.layers[index]

    def reset(self, *, is_poisoned: bool = False) -> None:
        """Forget all contents."""
        if self.params is None:
            self.data.fill_(float("nan") if is_poisoned else 0.0)
            return
        self.data.fill_(0xFF if is_poisoned else 0)
        self.params.fill_(_POISON_PARAMS if is_poisoned else 0)

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy leading slots of K and V, all layers, block to block, in order."""
        for source, destination, num_tokens in copies:
            for stored in (self.data, self.params):
                if stored is not None:
                    stored[:, :, destination, :, :num_tokens] = stored[:, :, source, :, :num_tokens]

    def _layer(self, index: int) -> LayerCache:
        k, v = self.data[index]
        if self.params is None:
            return LayerCache(self.kv_format, k, v)
        k_params, v_params = self.params[index]
        return LayerCache(self.kv_format, k, v, k_params, v_params)
