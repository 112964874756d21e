"""Phi3ForCausalLM (Phi-3 mini and medium, Phi-3.5 mini, Phi-4): a Llama with fused projections, of whose
heads only a first part may turn, and whose layers all have the same window, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from services.engine.kernels.rope import RopeConfig, pairs_apart
from services.engine.models.config import ModelConfig, parse_config, parse_window
from services.engine.models.fields import Fields
from services.engine.models.llama import Llama
from services.engine.models.names import Names
from services.engine.models.rope_fields import parse_partial_rope


class Phi3(Llama):
    """The same decoder. `qkv_proj` holds queries, then keys, then values; `gate_up_proj` gates, then ups."""

    names = Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. A missing window is none, and a missing rms_norm_eps 1e-5, as in
        transformers.
        """
        fields = Fields(raw)
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            if fields.boolean(name, False):
                raise fields.error(name, "is not supported for Phi3ForCausalLM")
        window = parse_window(fields) if "sliding_window" in raw else None
        config = parse_config(
            {"rms_norm_eps": 1e-5} | {name: value for name, value in raw.items() if value is not None},
            has_qkv_bias=False,
            has_output_bias=False,
            has_mlp_bias=False,
            rope=RopeConfig(10000.0),
        )
        return replace(
            config,
            rope=parse_partial_rope(fields, config.head_dim),
            layer_windows=(window,) * config.num_layers,
        )

    @staticmethod
    def qkv_order(config: ModelConfig) -> Tensor | None:
        """Queries and keys with the pairs that turn as far apart as in a head that turns whole."""
        turned = config.rope.rotary_dim
        if turned is None or turned == config.head_dim:
            return None
        num_rotated = config.num_heads + config.num_kv_heads
        rows = torch.arange((num_rotated + config.num_kv_heads) * config.head_dim)
        heads = rows.view(-1, config.head_dim)
        places = torch.tensor(pairs_apart(config.head_dim, turned))
        return torch.cat((heads[:num_rotated, places].flatten(), heads[num_rotated:].flatten()))
