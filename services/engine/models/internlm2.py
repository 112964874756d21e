"""InternLM2ForCausalLM (2 and 2.5): a Llama under other names, whose one projection of attention interleaves
queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from services.engine.models.config import ModelConfig, parse_config
from services.engine.models.fields import Fields
from services.engine.models.llama import Llama
from services.engine.models.names import Names


class InternLM2(Llama):
    """The same decoder. The rows of `wqkv` lie by kv head: its query heads, then its key, then its value."""

    names = Names(
        embedding="model.tok_embeddings",
        head="output",
        input_norm="attention_norm",
        qkv=("attention.wqkv",),
        output="attention.wo",
        mlp_norm="ffn_norm",
        gate_up=("feed_forward.w1", "feed_forward.w3"),
        down="feed_forward.w2",
    )

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. `bias` is attention's, true where it is missing; the MLP has none."""
        has_bias = Fields(raw).boolean("bias", True)
        return parse_config(raw, has_qkv_bias=has_bias, has_output_bias=has_bias, has_mlp_bias=False)

    @staticmethod
    def qkv_order(config: ModelConfig) -> Tensor:
        """All queries, all keys, all values, of rows that lie by kv head."""
        group = config.num_heads // config.num_kv_heads
        rows = torch.arange(config.num_kv_heads * (group + 2) * config.head_dim)
        by_head = rows.view(config.num_kv_heads, group + 2, config.head_dim)
        parts = by_head[:, :group], by_head[:, group], by_head[:, group + 1]
        return torch.cat([part.flatten() for part in parts])
