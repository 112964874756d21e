"""Gemma2ForCausalLM: norms around attention and MLP, scores and logits within a softcap, every other layer
with a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.engine.kernels.rope import RopeConfig
from services.engine.models.config import (
    ModelConfig,
    parse_config,
    parse_layer_types,
    parse_window,
)
from services.engine.models.fields import MAX_LAYERS, Fields
from services.engine.models.llama import Llama
from services.engine.models.names import Names

GEMMA_NAMES = Names(
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)


class Gemma2(Llama):
    """The same decoder with two more norms in a layer, a scaled embedding, and gelu for silu."""

    names = GEMMA_NAMES
    norm_offset = 1.0
    activation = "gelu"
    has_scaled_embedding = True

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. Missing fields are as in transformers."""
        fields = Fields(raw)
        config = parse_gemma(raw, pattern=2)
        return replace(
            config,
            attention_softcap=_softcap(fields, "attn_logit_softcapping", 50.0),
            logit_softcap=_softcap(fields, "final_logit_softcapping", 30.0),
        )


def parse_gemma(raw: Mapping[str, Any], *, pattern: int, rope: RopeConfig | None = None) -> ModelConfig:
    """What Gemma 2 and 3 have in common. Without `layer_types` every layer has a window but each
    `pattern`-th.
    """
    fields = Fields(raw)
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "is not supported (a row sees no later key)")
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    window = parse_window(fields)
    if raw.get("layer_types") is None:
        windows = tuple(window if (index + 1) % pattern else None for index in range(num_layers))
    else:
        windows = parse_layer_types(fields, num_layers, window)
    fields.integer("num_key_value_heads", 1, 1 << 20)  # transformers' default is no divisor of other heads
    has_bias = fields.boolean("attention_bias", False)
    config = parse_config(
        {"tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, **raw},
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_mlp_bias=False,
        layer_windows=windows,
        default_head_dim=256,
        activation_field="hidden_activation",
        activations=("gelu_pytorch_tanh",),
        rope=rope,
    )
    return replace(config, attention_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5)


def _softcap(fields: Fields, name: str, default: float) -> float | None:
    """A number above zero; null is none."""
    if name in fields.raw and fields.raw[name] is None:
        return None
    return fields.number(name, default)
