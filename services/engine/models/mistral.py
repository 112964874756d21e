"""MistralForCausalLM: a Llama without biases, whose layers all have the same window, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.engine.models.config import ModelConfig, parse_config, parse_window
from services.engine.models.fields import MAX_LAYERS, Fields
from services.engine.models.llama import Llama


class Mistral(Llama):
    """The same decoder; only the configuration is read differently."""

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig."""
        fields = Fields(raw)
        if raw.get("layer_types") is not None:
            raise fields.error("layer_types", "is not supported for MistralForCausalLM")
        num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        return parse_config(
            raw,
            has_qkv_bias=False,
            has_output_bias=False,
            has_mlp_bias=False,
            layer_windows=(parse_window(fields),) * num_layers,
        )
