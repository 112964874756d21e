"""The memory behind the blocks: one tensor for all layers, K and V. Does not know who owns a block."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from services.engine.core.batch import BlockCopy
from services.engine.models.config import ModelConfig
from services.engine.runner.config import RunnerConfig, RunnerConfigError

DEFAULT_KV_BYTES = 1 << 30
_log = logging.getLogger(__name__)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of K and V that one token takes in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def resolve_num_blocks(config: RunnerConfig, bytes_per_token: int, max_model_len: int) -> int:
    """How many blocks to allocate. Raises RunnerConfigError when not even one fits the memory given."""
    if config.num_blocks is not None:
        return config.num_blocks
    block_bytes = bytes_per_token * config.block_size
    if config.kv_memory_bytes is not None:
        fitting = config.kv_memory_bytes // block_bytes
        if fitting < 1:
            raise RunnerConfigError(
                f"kv_memory_bytes {config.kv_memory_bytes} is less than one block ({block_bytes} bytes)"
            )
        return fitting
    per_sequence = -(-max_model_len // config.block_size)
    fitting = max(1, min(per_sequence * config.max_batch_size, DEFAULT_KV_BYTES // block_bytes))
    if fitting < per_sequence:
        tokens = fitting * config.block_size
        _log.warning(
            "the default KV cache holds %d tokens, one sequence %d: give more memory", tokens, max_model_len
        )
    return fitting


class KVCache:
    """`data` [layers, 2, num_blocks + 1, kv_heads, block_size, head_dim]; block `scratch_block` is nobody's.

    Contents of a block that no sequence has written are meaningless; `is_poisoned` makes them NaN, so that a
    read of one shows.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        *,
        is_poisoned: bool = False,
    ) -> None:
        shape = (config.num_layers, 2, num_blocks + 1, config.num_kv_heads, block_size, config.head_dim)
        try:
            self.data: Tensor = torch.zeros(shape, dtype=dtype)
        except RuntimeError as error:
            raise RunnerConfigError(
                f"no memory for {num_blocks} blocks of {block_size} tokens: {error}"
            ) from error
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scratch_block = num_blocks
        self.reset(is_poisoned=is_poisoned)

    def reset(self, *, is_poisoned: bool = False) -> None:
        """Forget all contents."""
        self.data.fill_(float("nan") if is_poisoned else 0.0)

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copy leading slots of K and V, all layers, block to block, in order."""
        for source, destination, num_tokens in copies:
            self.data[:, :, destination, :, :num_tokens] = self.data[:, :, source, :, :num_tokens]
