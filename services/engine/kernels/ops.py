"""The one door to device code: every operation a model calls, sent to the backend of the tensors' device.

Each function has its twin of the same name in `reference`, which says what it computes. A backend is a
module-like object with these operations; the CPU's is assembled below from the twins, `tiled_attention` and
`linear`, the GPU's in `gpu.backend`, imported with the first CUDA tensor. A device without a backend is
refused by name. Knows no model, no request.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from services.engine.kernels import int4pack, native_layer, native_linear, reference
from services.engine.kernels.kv_format import LayerCache
from services.engine.kernels.linear import DenseLinear, Int4Linear, Linear
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

_log = logging.getLogger(__name__)


class CpuBackend:
    """The CPU's operations: the plain twins where their bits hold in every batch, else tiled forms."""

    embedding = staticmethod(reference.embedding)
    gather_rows = staticmethod(reference.gather_rows)
    rms_norm = staticmethod(native_layer.rms_norm)
    add_rms_norm = staticmethod(native_layer.add_rms_norm)
    rotary = staticmethod(reference.rotary)
    write_kv = staticmethod(reference.write_kv)
    rotary_write_kv = staticmethod(native_layer.rotary_write_kv)
    softcap = staticmethod(reference.softcap)
    silu_mul = staticmethod(native_layer.silu_mul)
    gelu_mul = staticmethod(reference.gelu_mul)
    linear_silu_mul = staticmethod(native_layer.linear_silu_mul)
    linear_gelu_mul = staticmethod(reference.linear_gelu_mul)
    paged_attention = staticmethod(native_layer.paged_attention)

    @staticmethod
    def make_dense_linear(weight: Tensor, bias: Tensor | None, numerics: Numerics) -> Linear:
        """The native product where it is in use, else a matmul by torch."""
        if native_linear.is_supported(weight.shape[1], weight.shape[1], numerics):
            return native_linear.make_dense(weight, bias)
        return DenseLinear(weight, bias, numerics)

    @staticmethod
    def make_int8_linear(weight: Tensor, bias: Tensor | None, numerics: Numerics) -> Linear:
        """Rounded to 8 bits where the native product takes that, else as it is."""
        group = native_linear.int8_group(weight.shape[1])
        if group is None or not native_linear.is_supported(weight.shape[1], group, numerics):
            return CpuBackend.make_dense_linear(weight, bias, numerics)
        return native_linear.make_int8(weight, group, bias)

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
        """The native product where it is in use, torch's 4-bit one where that is fast, else dequantised for
        every call.
        """
        in_features, out_features = values.shape
        if native_linear.is_supported(in_features, in_features // zeros.shape[0], numerics):
            return native_linear.make_int4(values, zeros, scales, bias)
        if int4pack.is_supported(in_features, out_features, in_features // zeros.shape[0], numerics):
            try:
                return int4pack.Int4PackLinear(values, zeros, scales, bias, numerics, scratch)
            except ValueError as error:
                _log.warning("4-bit linears are dequantised for every call: %s", error)
        return Int4Linear(values, zeros, scales, bias, numerics, scratch)


_BACKENDS: dict[str, Any] = {"cpu": CpuBackend}


def _backend(tensor: Tensor) -> Any:
    kind = tensor.device.type
    backend = _BACKENDS.get(kind)
    if backend is None:
        if kind not in supported_devices():
            names = " and ".join(supported_devices())
            raise NotImplementedError(f"no kernels for device {kind!r} (there are: {names})")
        # Not before the first tensor that needs it: Triton may be missing where there is no GPU.
        from services.engine.kernels.gpu.backend import GpuBackend

        backend = _BACKENDS[kind] = GpuBackend
    return backend


def supported_devices() -> tuple[str, ...]:
    """Device types that have a backend."""
    return ("cpu", "cuda")


def embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """ids [rows] -> [rows, hidden]."""
    return _backend(table).embedding(token_ids, table)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[rows, hidden], [n] -> [n, hidden]."""
    return _backend(x).gather_rows(x, rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[rows, hidden] -> [rows, hidden]."""
    return _backend(x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed sum, sum) of two [rows, hidden]."""
    return _backend(x).add_rms_norm(x, residual, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[rows, heads, head_dim] rotated by [rows, head_dim / 2] tables."""
    return _backend(x).rotary(x, cos, sin)


def write_kv(key: Tensor, value: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> None:
    """Store [rows, kv_heads, head_dim] into one layer's cache, quantised if its format is."""
    _backend(key).write_kv(key, value, cache, metadata)


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
    """From the fused projection [rows, heads + 2 * kv_heads, head_dim] to the query [rows, heads, head_dim]:
    per-head norms if given, rotary, K and V into the cache.
    """
    return _backend(qkv).rotary_write_kv(
        qkv, cos, sin, num_heads, cache, metadata, q_norm=q_norm, k_norm=k_norm, eps=eps
    )


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
    """Causal attention over the blocks; [rows, heads, head_dim] -> the same shape. With a window, the row at
    position p sees the keys p - window + 1 .. p; with a softcap, a score is softcap * tanh(score / softcap).
    """
    return _backend(query).paged_attention(
        query,
        cache,
        metadata,
        scale,
        numerics,
        scratch,
        sliding_window=sliding_window,
        softcap=softcap,
    )


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap) of fp32 x."""
    return _backend(x).softcap(x, cap)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * width] -> [rows, width]."""
    return _backend(gate_up).silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * width] -> [rows, width]."""
    return _backend(gate_up).gelu_mul(gate_up)


def linear_silu_mul(x: Tensor, gate_up: Linear) -> Tensor:
    """silu_mul(linear(x, gate_up)): [rows, in] -> [rows, width]."""
    return _backend(x).linear_silu_mul(x, gate_up)


def linear_gelu_mul(x: Tensor, gate_up: Linear) -> Tensor:
    """gelu_mul(linear(x, gate_up)): [rows, in] -> [rows, width]."""
    return _backend(x).linear_gelu_mul(x, gate_up)


def linear(x: Tensor, weight: Linear) -> Tensor:
    """[rows, in] -> [rows, out] by a linear that `make_dense_linear` or `make_int4_linear` made ready."""
    return weight(x)


def make_dense_linear(weight: Tensor, bias: Tensor | None, numerics: Numerics) -> Linear:
    """Ready weight [out, in] and bias [out] for their device."""
    return _backend(weight).make_dense_linear(weight, bias, numerics)


def make_int8_linear(weight: Tensor, bias: Tensor | None, numerics: Numerics) -> Linear:
    """Round weight [out, in] to 8 bits and ready it; a backend that has no such product keeps it as it is."""
    backend = _backend(weight)
    make = getattr(backend, "make_int8_linear", backend.make_dense_linear)
    linear: Linear = make(weight, bias, numerics)
    return linear


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
    """Ready a 4-bit weight: values uint8 [in, out], zeros uint8 and scales [in / group, out]. Reorders once.

    `is_gate_up` says that the outputs' halves are for `linear_silu_mul` or `linear_gelu_mul`: it changes no
    result, but where they lie.
    """
    return _backend(values).make_int4_linear(
        values, zeros, scales, bias, numerics, scratch, is_gate_up=is_gate_up
    )
