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


def balanced_keys(loader: WeightLoader, config: ModelConfig, *, has_qk_norm: bool) -> dict[str, Tensor]:
    """What to multiply the outputs of q_proj and k_proj with, [out] by name without ".weight"; of q_norm and
    k_norm where there are some. Empty for layers without a channel that sticks out.
    """
    factors: dict[str, Tensor] = {}
    group = config.num_heads // config.num_kv_heads
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        if has_qk_norm:
            norm = loader.dense(attention + "k_norm.weight", (config.head_dim,))
            divisors = key_divisors(norm.float().abs()[None])
            query = divisors[0]
            names = (attention + "q_norm", attention + "k_norm")
        else:
            divisors = key_divisors(_magnitude(loader, config, prefix))
            query = divisors.repeat_interleave(group, 0).flatten()
            names = (attention + "q_proj", attention + "k_proj")
        if bool((divisors != 1).any()):
            factors |= dict(zip(names, (query, 1 / divisors.flatten()), strict=True))
    return factors


def _magnitude(loader: WeightLoader, config: ModelConfig, prefix: str) -> Tensor:
    """Root mean square [kv_heads, head_dim] of a layer's keys, were its inputs even in all directions."""
    name, size = prefix + "self_attn.k_proj", config.num_kv_heads * config.head_dim
    norm = loader.dense(prefix + "input_layernorm.weight", (config.hidden_size,)).float()
    square = (loader.weight(name, size, config.hidden_size) * norm).square().sum(1)
    if config.has_qkv_bias:
        square = square + loader.dense(f"{name}.bias", (size,)).float().square()
    return square.sqrt().view(config.num_kv_heads, config.head_dim)
