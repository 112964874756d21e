"""How much of a device's memory the KV cache may have: what is left beside weights, activations and graphs.

Arithmetic on bytes, and the messages for when it does not add up. Knows no device and no model; whoever loads
them measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.runner.config import RunnerConfigError

GIB = 1 << 30
DEFAULT_FRACTION = 0.9
"""Of what is free, when nothing is said: the rest is slack, the allocator's and other processes'."""
GRAPH_RESERVE = 512 << 20
"""Kept free for what CUDA graphs share. They are captured after the cache has been sized."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes. `total` is the device's, `limit` what this engine may use of it."""

    total: int
    free: int
    limit: int


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes beside the cache. `activations`: all that the largest step takes, and that stays taken after it,
    which is neither weights nor cache. `graphs`: kept for CUDA graphs.
    """

    weights: int
    activations: int
    graphs: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.graphs

    def __str__(self) -> str:
        return (
            f"the weights take {_gib(self.weights)}, activations {_gib(self.activations)}, "
            f"graphs {_gib(self.graphs)}"
        )


def graph_bytes(vocab_size: int, rows_of_logits: int) -> int:
    """What CUDA graphs may take that keep so many rows of fp32 logits between replays."""
    return GRAPH_RESERVE + 4 * vocab_size * rows_of_logits


def resolve_limit(wanted: float | int | None, total: int, free: int) -> MemoryBudget:
    """The budget for `--gpu-memory`: a fraction of the device (a float up to 1), bytes (an int), or most of
    what is free. Raises RunnerConfigError when the device does not have so much left.
    """
    if wanted is None:
        limit = int(free * DEFAULT_FRACTION)
    elif isinstance(wanted, float):
        limit = int(total * wanted)
    else:
        limit = wanted
    if limit > free:
        raise RunnerConfigError(
            f"gpu_memory: {_gib(limit)} are asked for, {_gib(free)} of {_gib(total)} are free: "
            "another process may hold the rest, and CUDA itself takes some"
        )
    return MemoryBudget(total, free, limit)


def check_weights(budget: MemoryBudget, weight_bytes: int) -> None:
    """Refuse a model whose weights alone are too large, before they are loaded. Raises RunnerConfigError."""
    if weight_bytes > budget.limit:
        raise RunnerConfigError(
            f"the weights take {_gib(weight_bytes)}, the engine may use {_gib(budget.limit)} of the device's "
            f"{_gib(budget.total)}: give more memory (gpu_memory), or a smaller or quantized model"
        )


def blocks_that_fit(budget: MemoryBudget, use: MemoryUse, block_bytes: int, blocks_per_sequence: int) -> int:
    """Blocks of the KV cache, at least enough for one sequence of full length. Raises RunnerConfigError with
    every figure when that does not fit.
    """
    # One block more than counted is allocated: the scratch block.
    blocks = (budget.limit - use.total) // block_bytes - 1
    if blocks >= blocks_per_sequence:
        return blocks
    needed = (blocks_per_sequence + 1) * block_bytes
    raise RunnerConfigError(
        f"no room for the KV cache of one sequence: it takes {_gib(needed)}, and of {_gib(budget.limit)} "
        f"{use}. Give more memory (gpu_memory), a smaller max_model_len or max_batched_tokens, or a "
        "quantised kv_dtype"
    )


def check_cache(budget: MemoryBudget, use: MemoryUse, cache_bytes: int) -> None:
    """Refuse a cache whose size was given and that leaves too little for the rest. Raises RunnerConfigError
    with every figure.
    """
    if cache_bytes + use.total > budget.limit:
        raise RunnerConfigError(
            f"a KV cache of {_gib(cache_bytes)} is asked for, and of {_gib(budget.limit)} {use}. Ask for "
            "less (num_blocks, kv_memory), or leave its size out: then it takes what is left"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
