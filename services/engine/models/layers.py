"""The pieces a decoder of the Llama family is built of, over `kernels.ops`.

Knows tensors and one layer at a time; does not know checkpoints, sequences or who schedules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from services.engine.kernels import ops
from services.engine.kernels.kv_format import LayerCache
from services.engine.kernels.linear import Linear
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

Activation = Literal["silu", "gelu"]


class Rotation(NamedTuple):
    """Rotary angles, [positions or rows, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor


@dataclass(slots=True)
class StepContext:
    """What all layers of one forward share: the batch's shape and each row's rotary angles, of each kind of
    layer that the model has.
    """

    metadata: AttentionMetadata
    rotations: tuple[Rotation, ...]


@dataclass(slots=True)
class Attention:
    """Self-attention over the blocked cache. `qkv` is the fused projection: all q heads, then k, then v.

    `q_norm` and `k_norm` [head_dim], when the architecture has them, normalise each head before it is
    rotated. A row sees `sliding_window` keys, itself among them, or all. Scores are q.k times `scale`, within
    the `softcap` where there is one. `rotation`: which of the step's the layer takes.
    """

    qkv: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    numerics: Numerics
    scratch: Scratch
    scale: float
    softcap: float | None = None
    rotation: int = 0
    sliding_window: int | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0

    def __call__(self, x: Tensor, step: StepContext, cache: LayerCache) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; writes the rows' K and V before attending."""
        rows = x.shape[0]
        qkv = ops.linear(x, self.qkv).view(rows, -1, self.head_dim)
        rotation = step.rotations[self.rotation]
        query = ops.rotary_write_kv(
            qkv,
            rotation.cos,
            rotation.sin,
            self.num_heads,
            cache,
            step.metadata,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.eps,
        )
        mixed = ops.paged_attention(
            query,
            cache,
            step.metadata,
            self.scale,
            self.numerics,
            self.scratch,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
        )
        return ops.linear(mixed.reshape(rows, -1), self.output)


@dataclass(slots=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)). `gate_up` is the fused projection: gate, then up."""

    gate_up: Linear
    down: Linear
    activation: Activation = "silu"

    def __call__(self, x: Tensor) -> Tensor:
        gated = ops.linear_gelu_mul if self.activation == "gelu" else ops.linear_silu_mul
        return ops.linear(gated(x, self.gate_up), self.down)


@dataclass(slots=True)
class DecoderLayer:
    """Norm, attention, norm, MLP, with the residual carried beside (each addition is fused with the norm
    after it). What attention and the MLP give may pass another norm each before it is added.
    """

    input_norm: Tensor
    attention: Attention
    mlp_norm: Tensor
    mlp: GatedMlp
    eps: float
    attention_output_norm: Tensor | None = None
    mlp_output_norm: Tensor | None = None

    @property
    def norms(self) -> list[Tensor]:
        """The weights of all norms."""
        found = (
            self.input_norm,
            self.attention.q_norm,
            self.attention.k_norm,
            self.attention_output_norm,
            self.mlp_norm,
            self.mlp_output_norm,
        )
        return [norm for norm in found if norm is not None]

    def __call__(
        self, x: Tensor, residual: Tensor | None, step: StepContext, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """(the layer's last addend, the residual to add it to)."""
        if residual is None:
            normed, residual = ops.rms_norm(x, self.input_norm, self.eps), x
        else:
            normed, residual = ops.add_rms_norm(x, residual, self.input_norm, self.eps)
        attended = self._normed(self.attention(normed, step, cache), self.attention_output_norm)
        normed, residual = ops.add_rms_norm(attended, residual, self.mlp_norm, self.eps)
        return self._normed(self.mlp(normed), self.mlp_output_norm), residual

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else ops.rms_norm(x, weight, self.eps)
