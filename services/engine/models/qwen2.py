"""Qwen2ForCausalLM: a Llama whose q, k and v have biases, always; its window is off unless the config turns
it on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.engine.models.config import MAX_POSITIONS, Fields, ModelConfig, parse_config
from services.engine.models.llama import Llama


class Qwen2(Llama):
    """The same decoder; only the configuration is read differently."""

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig."""
        fields = Fields(raw)
        window = None
        if fields.boolean("use_sliding_window", False) and raw.get("sliding_window") is not None:
            window = fields.integer("sliding_window", 1, MAX_POSITIONS)
        return parse_config(
            raw, has_qkv_bias=True, has_output_bias=False, has_mlp_bias=False, sliding_window=window
        )
