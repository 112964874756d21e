"""Plain PyTorch twins of every operation: the specification, the oracle of the tests, and most of the CPU
backend.

Everything here gives a row the same bits whatever other rows are beside it, with two exceptions that say so:
`linear` (see `services.engine.kernels.linear` for the padded form) and `paged_attention` (`tiled_attention`
is the form whose bits hold). Nothing here knows a device other than through the tensors it gets.

A layer's K and V are [num_blocks + 1, kv_heads, block_size, row_size] each (see `kv_format`): one head's
share of a block is contiguous, so that attention over one kv head streams it without a gather per token, and
a block of 128 tokens is one key tile as it lies. The last block is scratch: rows that belong to no sequence
write there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels.kv_format import LayerCache, dequantize, quantize
from services.engine.kernels.linear import Linear
from services.engine.kernels.metadata import AttentionMetadata

GELU_CUBE = 0.044715
GELU_SCALE = -2.0 * math.sqrt(2.0 / math.pi)
"""Of the tanh formula of gelu: sqrt(2 / pi) (x + 0.044715 x^3), times -2."""


def embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows of `table` [vocab, hidden] for int64 ids [rows]."""
    return table.index_select(0, token_ids)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows [n] of x [rows, hidden] whose logits are wanted."""
    return x.index_select(0, rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32; [rows, hidden] (arXiv
    1910.07467).

    Rounded to x's dtype before the weight is multiplied in, or once, after it, where the weight is fp32.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(row_mean_square(wide) + eps)
    if weight.dtype == torch.float32:
        return (normed * weight).to(x.dtype)
    return normed.to(x.dtype) * weight


def row_mean_square(x: Tensor) -> Tensor:
    """mean(x^2) over the last dimension, kept. A lone row is doubled first.

    torch splits a reduction to a single number over threads once it is longer than its grain of 32768, and
    then the sum's order, hence its bits, differ from those of the same row among others.
    """
    if x.shape[0] == 1 and x.shape[-1] > 32768:
        return x.expand(2, -1).pow(2).mean(-1, keepdim=True)[:1]
    return x.pow(2).mean(-1, keepdim=True)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the residual addition fused with the norm after it."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [rows, heads, head_dim] by per-row tables cos and sin [rows, head_dim / 2], in fp32 (arXiv
    2104.09864).

    The pairs are (i, i + head_dim / 2), as in the Hugging Face checkpoints of Llama and Qwen2.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def write_kv(key: Tensor, value: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> None:
    """Store K and V [rows, kv_heads, head_dim] into their slots of one layer's cache, in place."""
    rows = metadata.cache_rows(key.shape[1])
    for vectors, stored, params in ((key, cache.k, cache.k_params), (value, cache.v, cache.v_params)):
        flat = vectors.reshape(-1, vectors.shape[-1])
        if params is None:
            stored.view(-1, stored.shape[-1]).index_copy_(0, rows, flat.to(stored.dtype))
            continue
        codes, packed = quantize(flat, cache.kv_format)
        stored.view(-1, stored.shape[-1]).index_copy_(0, rows, codes)
        params.view(-1).index_copy_(0, rows, packed)


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
    """All between the fused projection and attention: per-head norms, rotary, and the write of K and V.

    qkv [rows, heads + 2 * kv_heads, head_dim] holds all heads of q, then of k, then of v; cos and sin [rows,
    head_dim / 2]. `q_norm` and `k_norm` [head_dim] normalise each head of q and of k by `rms_norm` before
    they are rotated (arXiv 2010.04245, with RMS); none leaves them. Returns the query [rows, heads,
    head_dim].
    """
    rotated_heads = num_heads + cache.num_kv_heads
    heads = qkv[:, :rotated_heads]
    if q_norm is not None and k_norm is not None:
        query, key = heads[:, :num_heads], heads[:, num_heads:]
        heads = torch.cat((rms_norm(query, q_norm, eps), rms_norm(key, k_norm, eps)), 1)
    rotated = rotary(heads, cos, sin)
    write_kv(rotated[:, num_heads:], qkv[:, rotated_heads:], cache, metadata)
    return rotated[:, :num_heads]


def paged_attention(
    query: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of query [rows, heads, head_dim] over its sequence's blocks; same shape.

    The row at position p sees the keys 0 .. p, or p - sliding_window + 1 .. p. Scores pass `softcap`, if it
    is given, before the softmax. One softmax per sequence, in fp32. Slots outside a sequence's context are
    never touched: they may hold anything. Padding rows give zeros.
    """
    out = torch.zeros_like(query)
    kv_heads, block_size = cache.num_kv_heads, cache.block_size
    groups = query.shape[1] // kv_heads
    starts = metadata.query_starts
    for index, context in enumerate(metadata.context_lens):
        rows = slice(starts[index], starts[index + 1])
        blocks = metadata.block_tables[index, : -(-context // block_size)]
        keys, values = (
            wide.transpose(1, 2).flatten(0, 1)[:context].repeat_interleave(groups, 1)
            for wide in _read_blocks(cache, blocks)
        )
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), keys) * scale
        if softcap is not None:
            scores = cap_scores(scores, softcap)
        distance = metadata.positions[rows][:, None] - torch.arange(context, device=query.device)[None, :]
        is_hidden = distance < 0
        if sliding_window is not None:
            is_hidden |= distance >= sliding_window
        weights = scores.masked_fill(is_hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
    return out


def _read_blocks(cache: LayerCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(K, V) of blocks [n] in fp32, [n, kv_heads, block_size, head_dim] each."""
    if cache.k_params is None or cache.v_params is None:
        return cache.k[blocks].float(), cache.v[blocks].float()
    return (
        dequantize(cache.k[blocks], cache.k_params[blocks], cache.kv_format),
        dequantize(cache.v[blocks], cache.v_params[blocks], cache.kv_format),
    )


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap) of fp32 x (arXiv 2408.00118).

    tanh is written with exp, whose bits are the same at every position of a row.
    """
    return cap_scores(x.clone(), cap)


def cap_scores(x: Tensor, cap: float) -> Tensor:
    """`softcap` in place."""
    # tanh(y) = 1 - 2 / (exp(2 y) + 1): an exp that is infinite gives 1.
    return x.mul_(2.0 / cap).exp_().add_(1.0).reciprocal_().mul_(-2.0 * cap).add_(cap)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [rows, 2 * width] -> [rows, width], in fp32.

    Written as x / (1 + exp(-x)): torch's own silu gives other bits at other positions of a row.
    """
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width].float(), gate_up[..., width:].float()
    return (gate / (torch.exp(-gate) + 1.0) * up).to(gate_up.dtype)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up for gate_up [rows, 2 * width] -> [rows, width], in fp32, by the tanh formula (arXiv
    1606.08415).

    0.5 x (1 + tanh(y)) is x / (1 + exp(-2 y)), which needs no other function than `silu_mul` does.
    """
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width].float(), gate_up[..., width:].float()
    inner = gate * gate * gate * GELU_CUBE + gate
    return (gate / (torch.exp(inner * GELU_SCALE) + 1.0) * up).to(gate_up.dtype)


def linear_silu_mul(x: Tensor, gate_up: Linear) -> Tensor:
    """`silu_mul` of what the fused gate and up projection gives for x [rows, in] -> [rows, width]."""
    return silu_mul(gate_up(x))


def linear_gelu_mul(x: Tensor, gate_up: Linear) -> Tensor:
    """`gelu_mul` of what the fused gate and up projection gives for x [rows, in] -> [rows, width]."""
    return gelu_mul(gate_up(x))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] @ weight [out, in]^T + bias. Bits depend on the number of rows."""
    return F.linear(x, weight, bias)


def dequantize_int4(values: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """(q - z) * s in fp32: values [in, out] 0..15, zeros and scales [in / group, out] -> [in, out]."""
    grouped = values.unflatten(0, (zeros.shape[0], -1)).float()
    return ((grouped - zeros.float()[:, None]) * scales.float()[:, None]).flatten(0, 1)


def w4a16_linear(
    x: Tensor, values: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [rows, in] times the dequantised weight of `dequantize_int4`, in x's dtype."""
    y = x @ dequantize_int4(values, zeros, scales).to(x.dtype)
    return y if bias is None else y + bias
