"""What the tensors of an architecture are called, as data.

Names of a block's parts are relative to the block, and name a linear or a norm without ".weight". Knows
names only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Names:
    """The defaults are Llama's.

    Attributes:
        block: the prefix of block `index`.
        qkv: the projections of attention, or the one linear that is all three.
        attention_output_norm, mlp_output_norm: norms between attention, or the MLP, and the residual.
        mlp_norm: the norm before the MLP.
        gate_up: both projections, or the one linear that is both.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    block: str = "model.layers.{index}."
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    attention_output_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_output_norm: str | None = None
