"""The architectures that can be quantized, as data: names of tensors, which linears share which scale, and
what tells the blocks of one family from those of another.

A scale group says: these linears read the same input, so its channels can be multiplied in their columns
when `previous` is divided by as much. `previous` is a norm, or a linear whose output channels reach the
group's input unchanged but for a linear map per channel (v through attention to o, up through the product
to down). Norms between a linear and the residual stream (Gemma's post-norms) and norms of queries and keys
take no part. This module does not know how scales are found or applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_PARAMETERS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Names are relative to the decoder block, as the `transformers` class has them.

    Attributes:
        previous: the module that takes the inverse scales. A linear that holds more rows than the group has
            producers holds the producers last: v in (q, k, v), up in (gate, up).
        linears: what shares the input. A serving engine may fuse them, so they are quantized together or
            not at all.
        inspect: the module whose output decides between candidates.
        is_value: `previous` is the value projection: under grouped-query attention one of its channels feeds
            several of the group's input channels.
        norm_offset: what the norm `previous` adds to its stored weight.
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str
    is_value: bool = False
    norm_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class FusedRows:
    """A stored linear that holds several of the block's: for each key-value head in turn, that head's share
    of the rows of each part.
    """

    stored: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names as in the checkpoint, and the `transformers` classes that compute it.

    Attributes:
        module, config_class, layer_class, norm_class, rotary_class: of `transformers`.
        groups: which linears share a scale.
        stored_names: (module of the block, its name in the checkpoint) where the two differ.
        fused: stored linears that hold several of the block's.
        config_fields: field of the `transformers` class -> (the checkpoint's field, what its absence means),
            where the checkpoint's own class has others.
        unsupported: fields of config.json that must be absent, null or false.
        windows: which layers may have a sliding window: none, all, or those that `layer_types` names.
        attention: the implementation of `transformers` that can compute it.
        has_rotary_per_type: whether sliding and full layers turn by different angles.
        scales_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        caps_logits: whether `final_logit_softcapping` bounds the logits.
    """

    module: str
    config_class: str
    layer_class: str
    norm_class: str
    rotary_class: str
    groups: tuple[ScaleGroup, ...]
    block_prefix: str = "model.layers.{index}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    stored_names: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[FusedRows, ...] = ()
    config_fields: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    windows: Literal["none", "all", "by type"] = "none"
    attention: Literal["sdpa", "eager"] = "sdpa"
    has_rotary_per_type: bool = False
    scales_embedding: bool = False
    caps_logits: bool = False

    @property
    def family(self) -> str:
        """The last part of the module's name."""
        return self.module.rsplit(".", 1)[1]

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of a block that are quantized, in order of the computation."""
        return tuple(name for group in self.groups for name in group.linears)

    def stored_name(self, name: str) -> str:
        """The checkpoint's name, relative to the block, of a module or a parameter of it; of several
        modules, separated by spaces, theirs.
        """
        return " ".join(dict.fromkeys(self._stored_name(part) for part in name.split(" ")))

    def _stored_name(self, name: str) -> str:
        module, _, parameter = name.rpartition(".")
        if parameter in _PARAMETERS:
            return f"{self._stored_name(module)}.{parameter}"
        for fused in self.fused:
            if name in fused.parts:
                return fused.stored
        return self.stored_names.get(name, name)


def _pre_norm_groups(
    norm_offset: float = 0.0, before_mlp: str = "post_attention_layernorm"
) -> tuple[ScaleGroup, ...]:
    """Attention and a gated feed-forward, each behind a norm of its own."""
    attention_inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        ScaleGroup("input_layernorm", attention_inputs, inspect="self_attn", norm_offset=norm_offset),
        ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), inspect="self_attn.o_proj", is_value=True),
        ScaleGroup(before_mlp, ("mlp.gate_proj", "mlp.up_proj"), inspect="mlp", norm_offset=norm_offset),
        ScaleGroup("mlp.up_proj", ("mlp.down_proj",), inspect="mlp.down_proj"),
    )


_FUSED_GROUPS = (
    ScaleGroup("input_layernorm", ("self_attn.qkv_proj",), inspect="self_attn"),
    ScaleGroup("self_attn.qkv_proj", ("self_attn.o_proj",), inspect="self_attn.o_proj", is_value=True),
    ScaleGroup("post_attention_layernorm", ("mlp.gate_up_proj",), inspect="mlp"),
    ScaleGroup("mlp.gate_up_proj", ("mlp.down_proj",), inspect="mlp.down_proj"),
)


def _architecture(family: str, prefix: str, config_class: str = "", **rest: Any) -> Architecture:
    """With the names that `transformers` gives the classes of a family."""
    return Architecture(
        module=f"transformers.models.{family}",
        config_class=config_class or f"{prefix}Config",
        layer_class=f"{prefix}DecoderLayer",
        norm_class=f"{prefix}RMSNorm",
        rotary_class=f"{prefix}RotaryEmbedding",
        **{"groups": _pre_norm_groups(), **rest},
    )


def _gemma(family: str, prefix: str, **rest: Any) -> Architecture:
    """A norm before and after both halves of a block; those after stand between a linear and the residual
    stream and are no producers. All norms multiply by 1 + weight.
    """
    return _architecture(
        family,
        prefix,
        groups=_pre_norm_groups(1.0, "pre_feedforward_layernorm"),
        windows="by type",
        scales_embedding=True,
        caps_logits=True,
        **rest,
    )


ARCHITECTURES = {
    "LlamaForCausalLM": _architecture("llama", "Llama"),
    "MistralForCausalLM": _architecture("mistral", "Mistral", windows="all", unsupported=("layer_types",)),
    "Qwen2ForCausalLM": _architecture("qwen2", "Qwen2", windows="by type"),
    "Qwen3ForCausalLM": _architecture("qwen3", "Qwen3", windows="by type"),
    "InternLM2ForCausalLM": _architecture(
        "llama",
        "Llama",
        embedding="model.tok_embeddings.weight",
        head="output.weight",
        stored_names={
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
        },
        fused=(FusedRows("attention.wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),),
        config_fields={"attention_bias": ("bias", True)},
    ),
    # `transformers` computes it with Llama's classes, where one flag rules the biases of q, k, v and o.
    "InternLM3ForCausalLM": _architecture(
        "llama",
        "Llama",
        config_fields={"attention_bias": ("qkv_bias", False), "mlp_bias": ("bias", False)},
    ),
    "Phi3ForCausalLM": _architecture("phi3", "Phi3", groups=_FUSED_GROUPS, windows="all"),
    "Gemma2ForCausalLM": _gemma(
        "gemma2", "Gemma2", attention="eager", unsupported=("use_bidirectional_attention",)
    ),
    "Gemma3ForCausalLM": _gemma(
        "gemma3",
        "Gemma3",
        config_class="Gemma3TextConfig",
        has_rotary_per_type=True,
        unsupported=("use_bidirectional_attention", "attn_logit_softcapping"),
    ),
}
