"""Gemma3ForCausalLM, the text models: a Gemma 2 without caps, whose heads are normalised before they turn,
and whose layers with a window turn by a base of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.engine.models.config import ModelConfig
from services.engine.models.fields import MAX_LAYERS, Fields
from services.engine.models.gemma2 import Gemma2, parse_gemma
from services.engine.models.rope_fields import parse_layer_ropes


class Gemma3(Gemma2):
    """The same decoder with q_norm and k_norm weights."""

    has_qk_norm = True

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. Missing fields are as in transformers."""
        fields = Fields(raw)
        if raw.get("attn_logit_softcapping") is not None:
            raise fields.error("attn_logit_softcapping", "is not supported for Gemma3ForCausalLM (null is)")
        rope, local_rope = parse_layer_ropes(fields)
        pattern = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, default=6)
        config = parse_gemma(raw, pattern=pattern, rope=rope)
        has_cap = raw.get("final_logit_softcapping") is not None
        return replace(
            config,
            local_rope=local_rope,
            logit_softcap=fields.number("final_logit_softcapping") if has_cap else None,
        )
