"""InternLM3ForCausalLM: a Llama whose biases are named by two fields of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.engine.models.config import ModelConfig, parse_config
from services.engine.models.fields import Fields
from services.engine.models.llama import Llama


class InternLM3(Llama):
    """The same decoder; only the configuration is read differently."""

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. `qkv_bias` is that of q, k and v, `bias` that of all other linears."""
        fields = Fields(raw)
        has_bias = fields.boolean("bias", fields.boolean("mlp_bias", False))
        return parse_config(
            raw,
            has_qkv_bias=fields.boolean("qkv_bias", fields.boolean("attention_bias", False)),
            has_output_bias=has_bias,
            has_mlp_bias=has_bias,
        )
