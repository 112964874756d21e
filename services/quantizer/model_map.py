"""The architectures that can be quantized, as data: names of tensors, and which linears share which scale.

A scale group says: these linears read the same input, so its channels can be multiplied in their columns
when `previous` is divided by as much. `previous` is a norm, or a linear whose output channels reach the
group's input unchanged but for a linear map per channel (v through attention to o, up through the product
to down). This module does not know how scales are found or applied.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Names are relative to the decoder block.

    Attributes:
        previous: the module that takes the inverse scales.
        linears: what shares the input. A serving engine may fuse them, so they are quantized together or
            not at all.
        inspect: the module whose output decides between candidates.
        is_value: `previous` is the value projection: under grouped-query attention one of its channels feeds
            several of the group's input channels.
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str
    is_value: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names as in the checkpoint, and the `transformers` classes that compute it."""

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

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of a block that are quantized, in order of the computation."""
        return tuple(name for group in self.groups for name in group.linears)


_PRE_NORM_GROUPS = (
    ScaleGroup(
        "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), inspect="self_attn"
    ),
    ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), inspect="self_attn.o_proj", is_value=True),
    ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), inspect="mlp"),
    ScaleGroup("mlp.up_proj", ("mlp.down_proj",), inspect="mlp.down_proj"),
)

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        module="transformers.models.llama",
        config_class="LlamaConfig",
        layer_class="LlamaDecoderLayer",
        norm_class="LlamaRMSNorm",
        rotary_class="LlamaRotaryEmbedding",
        groups=_PRE_NORM_GROUPS,
    ),
    "Qwen2ForCausalLM": Architecture(
        module="transformers.models.qwen2",
        config_class="Qwen2Config",
        layer_class="Qwen2DecoderLayer",
        norm_class="Qwen2RMSNorm",
        rotary_class="Qwen2RotaryEmbedding",
        groups=_PRE_NORM_GROUPS,
    ),
}
