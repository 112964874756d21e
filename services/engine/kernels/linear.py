"""The CPU backend's linears: dense, and 4-bit weights dequantised into a scratch buffer for each call.

Knows tensors and `Numerics`; does not know which layer of which model a linear is, nor how a checkpoint
stores it.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels.numerics import Numerics, pad_rows
from services.engine.kernels.scratch import Scratch


class Linear(Protocol):
    """A linear made ready for one backend: x [rows, in] -> [rows, out]."""

    in_features: int
    out_features: int
    path: str
    num_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it; the result has x's dtype."""


class DenseLinear:
    """An unquantised linear. `weight` [out, in] and `bias` [out] are kept in the dtype of the activations."""

    path = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None, numerics: Numerics) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = weight.to(numerics.dtype).contiguous()
        self.bias = None if bias is None else bias.to(numerics.dtype)
        self.num_bytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        self._row_tile = numerics.row_tile if numerics.is_deterministic else 1

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(pad_rows(x, self._row_tile), self.weight)[: x.shape[0]]
        return y if self.bias is None else y.add_(self.bias)


class Int4Linear:
    """A 4-bit linear: dequantise into scratch, then one matmul. The weight in memory stays 4 bit.

    Within a group, the byte (i, n) holds input channel i of output n in its low nibble and channel i + group
    / 2 in its high one: both halves of a group come out as whole rows, so every pass of the dequantisation is
    a long vector loop (0.25 to 0.3 ns per weight on one AVX-512 core pair, against 0.5 and more for layouts
    that interleave).
    """

    path = "int4-dequantize"

    def __init__(
        self,
        values: Tensor,
        zeros: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        numerics: Numerics,
        scratch: Scratch,
    ) -> None:
        """values uint8 [in, out], zeros uint8 and scales [in / group, out]; the group must be even."""
        self.in_features, self.out_features = values.shape
        self.num_groups = zeros.shape[0]
        self.group_size = self.in_features // self.num_groups
        if self.group_size * self.num_groups != self.in_features or self.group_size % 2:
            raise ValueError(
                f"{self.in_features} inputs do not split into {self.num_groups} groups of even size"
            )
        grouped = values.unflatten(0, (self.num_groups, 2, self.group_size // 2))
        self.packed = (grouped[:, 0] | (grouped[:, 1] << 4)).contiguous()
        self.zeros = zeros.to(torch.int8).unsqueeze(1).contiguous()
        self.scales = scales.float().unsqueeze(1).contiguous()
        self.bias = None if bias is None else bias.to(numerics.dtype)
        self.num_bytes = self.packed.nbytes + self.zeros.nbytes + self.scales.nbytes
        self._dtype = numerics.dtype
        self._row_tile = numerics.row_tile if numerics.is_deterministic else 1
        self._scratch = scratch

    def dequantize(self) -> Tensor:
        """The weight [in, out] in the activations' dtype, rounded once. Valid until any linear's next
        call.
        """
        half = self.group_size // 2
        shape = (self.num_groups, self.group_size, self.out_features)
        nibbles = self._scratch.take("nibbles", shape, torch.uint8)
        torch.bitwise_and(self.packed, 15, out=nibbles[:, :half])
        torch.bitwise_right_shift(self.packed, 4, out=nibbles[:, half:])
        shifted = nibbles.view(torch.int8).sub_(self.zeros)
        weight = self._scratch.take("weight", shape, torch.float32)
        weight.copy_(shifted).mul_(self.scales)
        if self._dtype != torch.float32:
            weight = self._scratch.take("weight", shape, self._dtype).copy_(weight)
        return weight.view(self.in_features, self.out_features)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.mm(pad_rows(x, self._row_tile), self.dequantize())[: x.shape[0]]
        return y if self.bias is None else y.add_(self.bias)


class ConcatLinear:
    """Linears that share an input but could not be fused into one, side by side: outputs concatenated."""

    def __init__(self, parts: list[Linear]) -> None:
        self.parts = parts
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.num_bytes = sum(part.num_bytes for part in parts)
        self.path = "+".join(sorted({part.path for part in parts}))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)
