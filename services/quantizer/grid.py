"""The asymmetric 4-bit grid of one group of weights, exactly as it is stored: fp16 scale, integer zero.

    scale = fp16(max((high - low) / 15, 2^-14)),  zero = clamp(round(-low / scale), 0, 15)
    q = clamp(round(w / scale) + zero, 0, 15),    w' = (q - zero) * scale

Everything after the scale's rounding uses the stored value, so an error computed here is the error of the
artifact. Below 2^-14 fp16 is subnormal, which some kernels flush to zero. This module does not know how low
and high are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_VALUE = 15
MIN_SCALE = 2.0**-14


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`values` uint8 [out, in]; `zeros` uint8 and `scales` fp16 [out, in/group]."""

    values: Tensor
    zeros: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """fp32 [out, in]."""
        grouped = self.values.unflatten(1, (self.zeros.shape[1], -1)).float()
        return ((grouped - self.zeros.unsqueeze(-1).float()) * self.scales.unsqueeze(-1).float()).flatten(1)


def full_range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight along the last dimension, extended to hold zero (or zero itself would not
    be on the grid).
    """
    return grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)


def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero), both fp32 and shaped like `low`, the scale already rounded to fp16."""
    scale = ((high - low) / MAX_VALUE).clamp(min=MIN_SCALE).half().float()
    zero = torch.round(-low / scale).clamp(0, MAX_VALUE)
    return scale, zero


def snap(grouped: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest representable weights: `grouped` [..., group], `scale` and `zero` [...]."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    return ((torch.round(grouped / scale) + zero).clamp_(0, MAX_VALUE) - zero) * scale


def quantize(weight: Tensor, low: Tensor, high: Tensor) -> QuantizedWeight:
    """Quantize fp32 `weight` [out, in] with ranges [out, in/group]."""
    scale, zero = grid(low, high)
    grouped = weight.unflatten(1, (low.shape[1], -1))
    values = (torch.round(grouped / scale.unsqueeze(-1)) + zero.unsqueeze(-1)).clamp_(0, MAX_VALUE)
    return QuantizedWeight(values.flatten(1).to(torch.uint8), zero.to(torch.uint8), scale.half())


def round_to_nearest(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Plain rounding over the full range: the baseline that every other choice must beat."""
    return quantize(weight, *full_range(weight.unflatten(1, (-1, group_size))))
