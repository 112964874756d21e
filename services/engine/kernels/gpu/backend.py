"""The GPU's operations, assembled from the kernels beside this file: what `ops` sends CUDA tensors to.

Adapts the operations' arguments to the launchers' and chooses between two kernels for one operation. Knows no
model, and allocates nothing but results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.kernels import reference
from services.engine.kernels.gpu import rotary_write
from services.engine.kernels.gpu.dense_linear import GpuDenseLinear
from services.engine.kernels.gpu.embedding import embedding, gather_rows
from services.engine.kernels.gpu.gpu_metadata import GpuMetadata, gpu_metadata
from services.engine.kernels.gpu.norm import add_rms_norm, rms_norm
from services.engine.kernels.gpu.paged_decode import paged_decode
from services.engine.kernels.gpu.paged_prefill import paged_prefill
from services.engine.kernels.gpu.silu_mul import gelu_mul, silu_mul
from services.engine.kernels.gpu.w4a16_linear import GpuInt4Linear
from services.engine.kernels.kv_format import LayerCache
from services.engine.kernels.linear import Linear
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch


class GpuBackend:
    """Same operations and arguments as the CPU's backend; the twins in `reference` say what they compute."""

    embedding = staticmethod(embedding)
    gather_rows = staticmethod(gather_rows)
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    # Models rotate in `rotary_write_kv`; alone it is for tests and tools.
    rotary = staticmethod(reference.rotary)
    silu_mul = staticmethod(silu_mul)
    gelu_mul = staticmethod(gelu_mul)
    # A few small launches for a step's logits.
    softcap = staticmethod(reference.softcap)

    @staticmethod
    def write_kv(key: Tensor, value: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> None:
        """Store K and V [rows, kv_heads, head_dim] in their slots."""
        rotary_write.write_kv(key, value, cache, metadata.slot_mapping)

    @staticmethod
    def rotary_write_kv(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        cache: LayerCache,
        metadata: AttentionMetadata,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """[rows, heads + 2 * kv_heads, head_dim] -> the query [rows, heads, head_dim]; K and V are stored."""
        return rotary_write.rotary_write_kv(
            qkv, cos, sin, num_heads, cache, metadata.slot_mapping, q_norm, k_norm, eps
        )

    @staticmethod
    def paged_attention(
        query: Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        scale: float,
        numerics: Numerics,
        scratch: Scratch,
        *,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention over the blocks; [rows, heads, head_dim] -> the same shape.

        Decodes split a sequence's keys over programs; a deterministic engine goes without, so that a row has
        the bits of a decode and of a chunk alike.
        """
        plan = gpu_metadata(metadata)
        if plan.is_decode and not numerics.is_deterministic:
            return _decode(query, cache, plan, scale, sliding_window, softcap)
        return paged_prefill(
            query,
            cache,
            plan.block_tables,
            plan.query_starts,
            plan.context_lens,
            scale,
            max_query_len=plan.max_query_len,
            sliding_window=sliding_window,
            softcap=softcap,
            deterministic=numerics.is_deterministic,
        )

    @staticmethod
    def linear_silu_mul(x: Tensor, gate_up: Linear) -> Tensor:
        """silu_mul(gate_up(x)), in one launch where the linear can."""
        fused = getattr(gate_up, "silu_mul", None)
        return silu_mul(gate_up(x)) if fused is None else fused(x)

    @staticmethod
    def linear_gelu_mul(x: Tensor, gate_up: Linear) -> Tensor:
        """gelu_mul(gate_up(x)), in one launch where the linear can."""
        fused = getattr(gate_up, "gelu_mul", None)
        return gelu_mul(gate_up(x)) if fused is None else fused(x)

    @staticmethod
    def make_dense_linear(weight: Tensor, bias: Tensor | None, numerics: Numerics) -> Linear:
        """The vendor's matmul, or one of our own when a row must have the same bits in every batch."""
        return GpuDenseLinear(weight, bias, numerics)

    @staticmethod
    def make_int4_linear(
        values: Tensor,
        zeros: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        numerics: Numerics,
        scratch: Scratch,
        *,
        is_gate_up: bool = False,
    ) -> Linear:
        """Repacked for the product that dequantises in registers."""
        return GpuInt4Linear(values, zeros, scales, bias, numerics, scratch, is_gate_up=is_gate_up)


def _decode(
    query: Tensor,
    cache: LayerCache,
    plan: GpuMetadata,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of a batch whose row i is sequence i. Rows behind the last sequence are padding: zeros."""
    num_seqs = plan.context_lens.shape[0]
    is_padded = query.shape[0] > num_seqs
    out = torch.zeros_like(query) if is_padded else torch.empty_like(query)
    paged_decode(
        query[:num_seqs],
        cache,
        plan.block_tables,
        plan.context_lens,
        scale,
        max_context=plan.max_context,
        sliding_window=sliding_window,
        softcap=softcap,
        out=out[:num_seqs],
    )
    return out
