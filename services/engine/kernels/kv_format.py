"""How K and V lie in the cache: full precision, or codes with one scale and one minimum per token and head.

Knows one layer's tensors and the rounding of a value to a code. Does not know blocks' owners, nor devices:
the plain functions here specify what the device kernels compute, bit for bit.

A quantised vector of head_dim values is codes u and two bfloat16 numbers, scale s and minimum m:

    int8, int4   x ~ s * u + m     u in 0 .. 255 or 0 .. 15 (two to a byte: element 2i low, 2i + 1 high)
    fp8          x ~ s * u         u in float8 e4m3, m = 0

Asymmetric, because the keys of many models sit off zero. m is rounded down and s up, so that the largest and
smallest value stay within the codes, and u is computed from the rounded s and m, so that their rounding costs
at most the code's own. Attention never needs x: q.x = s (q.u) + m sum(q), and sum(p x) = sum((p s) u) + sum(p
m).

A vector with a value that is not finite, or whose range is not, gets the scale and minimum NaN and any codes:
all that attends to it is NaN, as it is in full precision, and the request that wrote it ends with an error
instead of going on with other numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SCALE = 2.0**-100
"""A vector of equal values has no range: its scale is this, its codes are 0."""
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class KVFormat:
    """What one value of K or V is stored as. `max_code` is None for floating-point codes."""

    name: str
    storage: torch.dtype
    values_per_unit: int = 1
    is_quantized: bool = False
    max_code: int | None = None

    def row_size(self, head_dim: int) -> int:
        """Elements of `storage` that one head's vector takes. Raises ValueError for odd heads in 4 bits."""
        if head_dim % self.values_per_unit:
            raise ValueError(f"{self.name} needs an even head_dim, found {head_dim}")
        return head_dim // self.values_per_unit

    def bytes_per_vector(self, head_dim: int) -> int:
        """Bytes of one head's vector, its scale and minimum included."""
        params = 4 if self.is_quantized else 0
        return self.row_size(head_dim) * self.storage.itemsize + params


FORMATS = {
    "float32": KVFormat("float32", torch.float32),
    "bfloat16": KVFormat("bfloat16", torch.bfloat16),
    "float16": KVFormat("float16", torch.float16),
    "int8": KVFormat("int8", torch.uint8, is_quantized=True, max_code=255),
    "int4": KVFormat("int4", torch.uint8, 2, is_quantized=True, max_code=15),
    "fp8": KVFormat("fp8", torch.uint8, is_quantized=True),
}


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's K and V.

    `k`, `v`: [num_blocks + 1, kv_heads, block_size, row_size] of the format's storage type (fp8 codes are
    uint8 views of float8_e4m3fn). `k_params`, `v_params`: int32 [num_blocks + 1, kv_heads, block_size] with
    the scale's bfloat16 bits in the low half and the minimum's in the high half; None when not quantised.
    """

    kv_format: KVFormat
    k: Tensor
    v: Tensor
    k_params: Tensor | None = None
    v_params: Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V."""
        return self.k.shape[1]

    @property
    def block_size(self) -> int:
        """Token slots per block."""
        return self.k.shape[2]


def quantize(x: Tensor, kv_format: KVFormat) -> tuple[Tensor, Tensor]:
    """(codes uint8 [..., row_size], params int32 [...]) of vectors [..., head_dim]."""
    wide = x.float()
    if kv_format.max_code is None:
        scale = _scale(wide.abs().amax(-1), FP8_MAX)
        codes = (wide / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8)
        return codes, pack_params(scale, torch.zeros_like(scale))
    low, high = torch.aminmax(wide, dim=-1)
    # Which of two zeros is the smaller one is nobody's promise: adding zero leaves the positive one.
    minimum = _round_down(low + 0.0)
    scale = _scale(high - minimum, kv_format.max_code)
    minimum = torch.where(scale.isnan(), math.nan, minimum)
    steps = ((wide - minimum.unsqueeze(-1)) / scale.unsqueeze(-1)).round()
    codes = steps.clamp(0, kv_format.max_code).to(torch.uint8)
    if kv_format.values_per_unit == 2:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, pack_params(scale, minimum)


def dequantize(codes: Tensor, params: Tensor, kv_format: KVFormat, out: Tensor | None = None) -> Tensor:
    """fp32 [..., head_dim] of what `quantize` made, into `out` when it is given."""
    scale, minimum = (part.unsqueeze(-1) for part in unpack_params(params))
    if out is None:
        width = codes.shape[-1] * kv_format.values_per_unit
        out = torch.empty(*codes.shape[:-1], width, dtype=torch.float32, device=codes.device)
    if kv_format.max_code is None:
        return _float8_to_float32(codes, out).mul_(scale)
    if kv_format.values_per_unit == 2:
        # Both nibbles of a byte into the two bytes of a word, in order: 3 passes over short elements.
        words = codes.to(torch.int16)
        codes = (words | words << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    out.copy_(codes)
    return out.mul_(scale).add_(minimum)


def _float8_to_float32(codes: Tensor, out: Tensor) -> Tensor:
    """The values of float8 e4m3 codes that are numbers, as torch converts them but ten times as fast.

    Exponent and mantissa, shifted to those of an fp32, make a number that is 2^120 times too small, because
    the exponents' biases are 7 and 127; subnormal codes become subnormal numbers.
    """
    bits = out.view(torch.int32).copy_(codes.view(torch.int8))
    bits.bitwise_left_shift_(20).bitwise_and_(-0x78100000)
    return out.mul_(2.0**120)


def _scale(extent: Tensor, max_code: float) -> Tensor:
    """The step of codes 0 .. max_code over `extent`; NaN when that is not finite."""
    step = extent / max_code
    scale = _round_up(step.clamp_min(MIN_SCALE))
    # Not the scale's own finiteness: rounding up makes a number of a NaN whose bits are all ones.
    return torch.where(step.isfinite(), scale, math.nan)


def pack_params(scale: Tensor, minimum: Tensor) -> Tensor:
    """int32 of two fp32 tensors whose values are bfloat16 numbers."""
    low = (scale.view(torch.int32) >> 16) & 0xFFFF
    return low | (minimum.contiguous().view(torch.int32) & -0x10000)


def unpack_params(params: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, minimum), fp32, of packed params."""
    return (params << 16).view(torch.float32), (params & -0x10000).view(torch.float32)


def _round_up(x: Tensor) -> Tensor:
    """The least bfloat16 number that is not below x > 0, as fp32."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _round_down(x: Tensor) -> Tensor:
    """The greatest bfloat16 number that is not above x, as fp32."""
    bits = x.contiguous().view(torch.int32)
    # Cutting bits off moves towards zero: down for positive numbers; negative ones go to the next one out.
    return (torch.where(x < 0, bits + 0xFFFF, bits) & -0x10000).view(torch.float32)
