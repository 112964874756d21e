"""Qwen3ForCausalLM: a Llama that normalises each head of q and k before it is rotated; some layers may have a
window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.engine.models.config import ModelConfig, parse_config, parse_layer_windows
from services.engine.models.fields import Fields
from services.engine.models.llama import Llama


class Qwen3(Llama):
    """The same decoder with q_norm and k_norm weights."""

    has_qk_norm = True

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. A missing head_dim is 128, as in transformers."""
        fields = Fields(raw)
        has_bias = fields.boolean("attention_bias", False)
        return parse_config(
            raw,
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            has_mlp_bias=False,
            layer_windows=parse_layer_windows(fields),
            default_head_dim=128,
        )
