"""How much of a device's memory the KV cache may have: what is left beside weights, activations and graphs.

Arithmetic on bytes, and the messages for when it does not add up. Knows no device and no model; whoever loads
them measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.runner.config import RunnerConfigError

GIB = 1 << 30
DEFAULT_FRACTION = 0.9
"""Of the device, when nothing is said: the rest is the driver's, the context's and the allocator's slack."""
GRAPH_RESERVE = 512 << 20
"""Kept free for CUDA graphs, which are captured after the cache has been sized."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes. `total` is the device's, `limit` what this engine may use of it."""

    total: int
    free: int
    limit: int


def resolve_limit(wanted: float | int | None, total: int, free: int) -> MemoryBudget:
    """The budget for `--gpu-memory`: a fraction of the device (a float up to 1), bytes (an int), or the
    default fraction. Raises RunnerConfigError when the device does not have so much left.
    """
    if wanted is None:
        limit = min(int(total * DEFAULT_FRACTION), free)
    elif isinstance(wanted, float):
        limit = int(total * wanted)
    else:
        limit = wanted
    if limit > free:
        raise RunnerConfigError(
            f"gpu_memory: {_gib(limit)} are asked for, {_gib(free)} of {_gib(total)} are free: "
            "another process may hold the rest"
        )
    return MemoryBudget(total, free, limit)


def check_weights(budget: MemoryBudget, weight_bytes: int) -> None:
    """Refuse a model whose weights alone are too large, before they are loaded. Raises RunnerConfigError."""
    if weight_bytes > budget.limit:
        raise RunnerConfigError(
            f"the weights take {_gib(weight_bytes)}, the engine may use {_gib(budget.limit)} of the device's "
            f"{_gib(budget.total)}: give more memory (gpu_memory), or a smaller or quantized model"
        )


def blocks_that_fit(
    budget: MemoryBudget, weight_bytes: int, activation_bytes: int, block_bytes: int, blocks_per_sequence: int
) -> int:
    """Blocks of the KV cache, at least enough for one sequence of full length. Raises RunnerConfigError with
    every figure when that does not fit.
    """
    left = budget.limit - weight_bytes - activation_bytes - GRAPH_RESERVE
    # One block more than counted is allocated: the scratch block.
    blocks = left // block_bytes - 1
    if blocks >= blocks_per_sequence:
        return blocks
    needed = (blocks_per_sequence + 1) * block_bytes
    raise RunnerConfigError(
        f"no room for the KV cache of one sequence: it takes {_gib(needed)}, and of {_gib(budget.limit)} "
        f"the weights take {_gib(weight_bytes)}, activations {_gib(activation_bytes)}, "
        f"graphs {_gib(GRAPH_RESERVE)}. "
        "Give more memory (gpu_memory), a smaller max_model_len or max_batched_tokens, or a quantised "
        "kv_dtype"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
