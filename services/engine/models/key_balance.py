"""Key channels that stick out are made smaller at load and the query's larger, by the same power of two.

No product of a query and a key changes, and no bit in full precision; but a quantised key has one step for
all its channels, and no longer spends its codes on a few. How large a channel will be is estimated from the
weights alone: the norm of its row over a normed input, with its bias; or the norm weight where keys are
normalised per head. Both channels of a rotary pair get one factor, so that they still turn together.

Knows names and weights of the Llama family. Does not know formats of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.models.config import ModelConfig
from services.engine.models.llama import Llama
from services.engine.models.weights import WeightLoader

LEAST, LARGEST = 4.0, 64.0
"""Factors below the one are left out: an estimate of twice as large is no finding. The other keeps the
query's weights far from the largest fp16 number.
"""


def key_divisors(magnitude: Tensor) -> Tensor:
    """Powers of two to divide channels by, [kv_heads, head_dim] like their magnitudes."""
    pairs = magnitude.double().unflatten(-1, (2, -1)).square().mean(-2).sqrt()
    usual = pairs.median(dim=-1, keepdim=True).values
    divisors = torch.exp2((pairs / usual).log2().round()).clamp(max=LARGEST)
    divisors = torch.where(divisors >= LEAST, divisors, 1.0)  # 1 as well where nothing is usual
    return divisors.float().repeat(1, 2).cpu()


def balanced_keys(loader: WeightLoader, config: ModelConfig, architecture: type[Llama]) -> dict[str, Tensor]:
    """What to multiply the outputs of the projections of queries and keys with, or the weights of their
    norms where there are some: [out], as they are stored, by name without ".weight". Empty for layers
    without a channel that sticks out.
    """
    factors: dict[str, Tensor] = {}
    names, order = architecture.names, architecture.qkv_order(config)
    group = config.num_heads // config.num_kv_heads
    for index in range(config.num_layers):
        prefix = names.block.format(index=index)
        if architecture.has_qk_norm:
            name = f"{prefix}{names.k_norm}.weight"
            norm = loader.dense(name, (config.head_dim,), offset=architecture.norm_offset)
            divisors = key_divisors(norm.float().abs()[None])
            found = {names.q_norm: divisors[0], names.k_norm: 1 / divisors[0]}
        else:
            divisors = key_divisors(_magnitude(loader, config, architecture, prefix, order))
            query, key = divisors.repeat_interleave(group, 0).flatten(), 1 / divisors.flatten()
            found = dict(zip(names.qkv, (query, key), strict=False))
            if len(names.qkv) == 1:
                ours = torch.cat((query, key, torch.ones_like(key)))
                stored = ours if order is None else torch.empty_like(ours).index_copy_(0, order, ours)
                found = {names.qkv[0]: stored}
        if bool((divisors != 1).any()):
            factors |= {prefix + name: factor for name, factor in found.items()}
    return factors


def _magnitude(
    loader: WeightLoader,
    config: ModelConfig,
    architecture: type[Llama],
    prefix: str,
    order: Tensor | None,
) -> Tensor:
    """Root mean square [kv_heads, head_dim] of a layer's keys, were its inputs even in all directions."""
    names, hidden = architecture.names, config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    is_fused = len(names.qkv) == 1
    name, size = prefix + names.qkv[0 if is_fused else 1], q_size + 2 * kv_size if is_fused else kv_size
    input_norm = f"{prefix}{names.input_norm}.weight"
    norm = loader.dense(input_norm, (hidden,), offset=architecture.norm_offset).float()
    square = (loader.weight(name, size, hidden) * norm).square().sum(1)
    if config.has_qkv_bias:
        square = square + loader.dense(f"{name}.bias", (size,)).float().square()
    if order is not None:
        square = square.index_select(0, order.to(square.device))
    if is_fused:
        square = square[q_size : q_size + kv_size]
    return square.sqrt().view(config.num_kv_heads, config.head_dim)
