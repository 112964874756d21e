"""What lies between a layer's linears, on the native kernels where they are in use and take the shape, else
on torch.

Same signatures as the twins in `reference`. Knows how to hand tensors to C; the arithmetic is
`native/layer.c`'s.
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL

import torch
from torch import Tensor

from services.engine.kernels import native, reference, tiled_attention
from services.engine.kernels.kv_format import LayerCache
from services.engine.kernels.linear import Linear
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

_LANES = 16
_DIM_MULTIPLE, _MAX_DIM = 32, 256
_UNIT_ROWS = 64


def takes_attention(head_dim: int, heads_each: int, softcap: float | None) -> bool:
    """Whether the kernels attend in this shape, over caches in bf16; `heads_each`: per kv head."""
    is_shape = head_dim % _DIM_MULTIPLE == 0 and head_dim <= _MAX_DIM and heads_each <= _UNIT_ROWS
    return is_shape and softcap is None


def _library(x: Tensor, width: int) -> CDLL | None:
    """The kernels, if they take x."""
    return native.active() if x.dtype == torch.bfloat16 and width % _LANES == 0 else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    library = _library(x, x.shape[-1])
    if library is None:
        return reference.rms_norm(x, weight, eps)
    return _norm(library, x.contiguous(), None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.add_rms_norm`."""
    library = _library(x, x.shape[-1])
    if library is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    return _norm(library, x.contiguous(), residual.contiguous(), weight, eps)


def _norm(
    library: CDLL, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    library.weft_rms_norm(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        total.data_ptr(),
        weight.data_ptr(),
        weight.dtype == torch.float32,
        eps,
        out.data_ptr(),
        x.numel() // width,
        width,
        torch.get_num_threads(),
    )
    return out, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.silu_mul`."""
    width = gate_up.shape[-1] // 2
    library = _library(gate_up, width)
    if library is None:
        return reference.silu_mul(gate_up)
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(gate_up.shape[0], width)
    rows, threads = gate_up.shape[0], torch.get_num_threads()
    library.weft_silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width, threads)
    return out


def linear_silu_mul(x: Tensor, gate_up: Linear) -> Tensor:
    """As `reference.linear_silu_mul`."""
    return silu_mul(gate_up(x))


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
    """As `reference.rotary_write_kv`. Norms of heads and caches that are not bf16 are torch's."""
    rows, _, dim = qkv.shape
    library = _library(qkv, dim // 2)
    if library is None or dim % _DIM_MULTIPLE or q_norm is not None or cache.k.dtype != torch.bfloat16:
        return reference.rotary_write_kv(
            qkv, cos, sin, num_heads, cache, metadata, q_norm=q_norm, k_norm=k_norm, eps=eps
        )
    query = qkv.new_empty(rows, num_heads, dim)
    qkv, cos, sin, slots = (tensor.contiguous() for tensor in (qkv, cos, sin, metadata.slot_mapping))
    library.weft_rotary_write_kv(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
        query.data_ptr(),
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        rows,
        num_heads,
        cache.num_kv_heads,
        metadata.block_size,
        dim,
        torch.get_num_threads(),
    )
    return query


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
    """As `tiled_attention.paged_attention`, which serves other caches than bf16 ones, and softcaps."""
    _, heads, dim = query.shape
    each = heads // cache.num_kv_heads
    library = _library(query, dim)
    if library is None or cache.k.dtype != torch.bfloat16 or not takes_attention(dim, each, softcap):
        return tiled_attention.paged_attention(
            query, cache, metadata, scale, numerics, scratch, sliding_window=sliding_window, softcap=softcap
        )
    plan = metadata.plan.get("native")
    if plan is None:
        plan = metadata.plan["native"] = _Plan(metadata, max(1, _UNIT_ROWS // each))
    query = query.contiguous()
    out = torch.zeros_like(query) if metadata.num_padding_rows else torch.empty_like(query)
    arguments = native.Attention(
        query.data_ptr(),
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        out.data_ptr(),
        *plan.pointers,
        metadata.num_seqs,
        plan.tables.shape[1],
        heads,
        cache.num_kv_heads,
        metadata.block_size,
        dim,
        sliding_window or 0,
        scale,
    )
    units = plan.units
    library.weft_attention(
        ctypes.byref(arguments), units.data_ptr(), units.shape[0], plan.rows_each, torch.get_num_threads()
    )
    return out


class _Plan:
    """One step's shape as the C code reads it, and its pieces of work: (sequence, first row)."""

    def __init__(self, metadata: AttentionMetadata, rows_each: int) -> None:
        self.rows_each = rows_each
        self.tables = metadata.block_tables.contiguous()
        lengths = metadata.query_lens
        self._shape = torch.tensor([metadata.query_starts[: len(lengths)], lengths, metadata.context_lens])
        self.pointers = (self.tables.data_ptr(), *(row.data_ptr() for row in self._shape))
        self.units = torch.tensor(
            [(index, row) for index, length in enumerate(lengths) for row in range(0, length, rows_each)]
        )
