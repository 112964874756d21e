"""A 4-bit linear on the GPU: one packed copy of the weight, and the path its rows take.

Up to 256 rows the fused product dequantises in registers; above, the weight is written to scratch once and
multiplied as a dense one. In deterministic mode all row counts take the fused product with one tile and one
split. Knows one weight and `Numerics`; not which layer it belongs to.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from services.engine.kernels.gpu.dense_linear import linear_with_residual
from services.engine.kernels.gpu.launch_configs import (
    MAX_FUSED_ROWS,
    REFERENCE_NUM_SMS,
    choose_fixed_splits,
    choose_w4a16,
    row_class,
    rows_per_launch,
    w4a16_deterministic_tile,
)
from services.engine.kernels.gpu.rounding import is_interpreting
from services.engine.kernels.gpu.silu_mul import Activation, activation_mul
from services.engine.kernels.gpu.w4a16 import w4a16
from services.engine.kernels.gpu.w4a16_dequantize import w4a16_dequantize
from services.engine.kernels.gpu.w4a16_repack import pack
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch


class GpuInt4Linear:
    """A 4-bit linear; `path` says what runs.

    w4a16: the fused product up to 256 rows, dequantise and matmul above.
    w4a16-fixed: the fused product with one launch configuration for all rows.
    w4a16-dequantize, w4a16-dequantize-fixed: dequantise and matmul always, because no span of the fused
    product divides the group, or because activations are fp32 (on a GPU; the interpreter runs all kernels).
    """

    def __init__(
        self,
        values: Tensor,
        zeros: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        numerics: Numerics,
        scratch: Scratch | None = None,
        *,
        is_gate_up: bool = False,
    ) -> None:
        """values uint8 [in, out], zeros uint8 and scales [in / group, out], bias [out].

        `is_gate_up` says that the first half of the outputs are gates and the second half their ups: they are
        packed side by side, so that `silu_mul` and `gelu_mul` need no second launch where the inputs are not
        split. Results do not change. `scratch` may be shared by all linears of a model. ValueError as `pack`.
        """
        self.in_features, self.out_features = values.shape
        self.packed = pack(values, zeros, scales, numerics.dtype, is_interleaved=is_gate_up)
        self.bias = None if bias is None else bias.to(numerics.dtype).contiguous()
        self.num_bytes = self.packed.num_bytes + (0 if self.bias is None else self.bias.nbytes)
        self._numerics = numerics
        self._scratch = scratch or Scratch()
        self._is_fused = self.packed.span is not None and (
            numerics.dtype != torch.float32 or is_interpreting()
        )
        self.path = "w4a16" if self._is_fused else "w4a16-dequantize"
        if numerics.is_deterministic:
            self.path += "-fixed"
        if not (self._is_fused and numerics.is_deterministic):
            # Now, not at the first call: a buffer that grew after a CUDA graph was captured would be freed
            # under it.
            self._take_weight(values.device)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out] in x's dtype, plus residual [rows, out]."""
        return self._apply(x, residual, None)

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up of the outputs' halves, [rows, out / 2]; rounded once, after the product."""
        return self._apply(x, None, "silu")

    def gelu_mul(self, x: Tensor) -> Tensor:
        """gelu(gate) * up, by the tanh formula; else as `silu_mul`."""
        return self._apply(x, None, "gelu")

    def dequantize(self) -> Tensor:
        """The weight [out, in], rounded once. Valid until any linear with the same scratch is called."""
        return w4a16_dequantize(self.packed, self._take_weight(self.packed.words.device))

    def _apply(self, x: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        if self._is_fused and self._numerics.is_deterministic:
            return self._apply_fixed(x, residual, activation)
        if self._is_fused and x.shape[0] <= MAX_FUSED_ROWS:
            packed = self.packed
            tile, num_splits = choose_w4a16(
                row_class(x.shape[0]),
                packed.span,
                packed.padded_outputs,
                packed.padded_inputs,
                _num_multiprocessors(x.device),
            )
            return w4a16(
                x, packed, tile, num_splits, bias=self.bias, residual=residual, activation=activation
            )
        y = linear_with_residual(x, self.dequantize(), self.bias, residual, self._numerics.is_deterministic)
        return y if activation is None else activation_mul(y, activation)

    def _apply_fixed(self, x: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
        packed, num_rows = self.packed, x.shape[0]
        tile = w4a16_deterministic_tile(packed.span)
        num_splits = choose_fixed_splits(tile, packed.padded_outputs, packed.padded_inputs, 4)
        width = self.out_features // 2 if activation else self.out_features
        out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
        needs_partial = num_splits > 1 or (activation is not None and not packed.is_interleaved)
        step = rows_per_launch(tile, num_splits, self.out_features) if needs_partial else max(num_rows, 1)
        for first in range(0, num_rows, step):
            rows = slice(first, first + step)
            w4a16(
                x[rows],
                packed,
                tile,
                num_splits,
                bias=self.bias,
                residual=None if residual is None else residual[rows],
                activation=activation,
                out=out[rows],
            )
        return out

    def _take_weight(self, device: torch.device) -> Tensor:
        shape = (self.out_features, self.in_features)
        return self._scratch.take("weight", shape, self._numerics.dtype, device)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return REFERENCE_NUM_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
