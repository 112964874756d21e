"""Qwen2ForCausalLM: a Llama whose q, k and v have biases, always; some layers may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.engine.models.config import ModelConfig, parse_config, parse_layer_windows
from services.engine.models.fields import Fields
from services.engine.models.llama import Llama


class Qwen2(Llama):
    """The same decoder; only the configuration is read differently."""

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig."""
        return parse_config(
            raw,
            has_qkv_bias=True,
            has_output_bias=False,
            has_mlp_bias=False,
            layer_windows=parse_layer_windows(Fields(raw)),
        )
