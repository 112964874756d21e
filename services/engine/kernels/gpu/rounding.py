"""Rounding inside kernels, to the bit: fp32 to a tensor's dtype, to bfloat16 up or down, to float8 e4m3.

Device functions only; knows no tensor. Triton's interpreter truncates where a device rounds to the nearest
bfloat16, and no device before sm_89 converts to float8, so both are also written here in integers.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def has_fp8_conversion(device: torch.device) -> bool:
    """Whether the device has an instruction for fp32 to float8 e4m3 (sm_89 and later)."""
    return not is_interpreting() and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 -> DTYPE, to the nearest, ties to even. NaN stays NaN."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry of a NaN's payload would run into its exponent.
        halves = tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
        return halves.to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def bfloat16_above(x):
    """fp32 bits of the least bfloat16 number that is not below x > 0."""
    return (x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000


@triton.jit
def bfloat16_below(x):
    """fp32 bits of the greatest bfloat16 number that is not above x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x < 0, bits + 0xFFFF, bits) & -0x10000


@triton.jit
def round_half_even(x):
    """int32 of 0 <= x < 2^22, to the nearest, ties to even: adding 2^23 leaves no fraction bits."""
    return (x + 8388608.0).to(tl.int32, bitcast=True) & 0x3FFFFF


@triton.jit
def float8_e4m3(x, HAS_CONVERSION: tl.constexpr):
    """uint8 code of fp32 x, to the nearest, ties to even; beyond 448 the largest finite code, NaN as 0x7F."""
    if HAS_CONVERSION:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        magnitude = bits & 0x7FFFFFFF
        # 20 of 23 fraction bits go; the exponent's bias falls from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the steps are 2^-9, which is the last fraction bit of a number from 2^14 to 2^15.
        subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
        code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        return tl.where(x == x, sign | code, 0x7F).to(tl.uint8)
