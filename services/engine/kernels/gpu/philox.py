"""The noise of a draw inside a kernel: Philox4x32-10 words and standard Gumbel noise made of them.

Device functions only; knows no logits and no tensor. The words are those of the CPU's generator, bit for bit;
the noise is fp32 and within 1e-5 of the exact value for every one of the 2^32 words.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_NUM_ROUNDS = tl.constexpr(10)
_LN_2 = tl.constexpr(0.6931471805599453)
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
_SMALL = tl.constexpr(0.0625)
"""Up to this distance from 1, the logarithm is a power series of the distance."""


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 tensors of one shape (keys may be scalars): four words for each counter."""
    multiplier_0 = tl.full((), _MULTIPLIER_0, tl.uint32)
    multiplier_1 = tl.full((), _MULTIPLIER_1, tl.uint32)
    weyl_0 = tl.full((), _WEYL_0, tl.uint32)
    weyl_1 = tl.full((), _WEYL_1, tl.uint32)
    for _ in tl.static_range(_NUM_ROUNDS):
        high_0 = tl.umulhi(c0, multiplier_0)
        high_1 = tl.umulhi(c2, multiplier_1)
        low_0 = c0 * multiplier_0
        low_1 = c2 * multiplier_1
        c0 = high_1 ^ c1 ^ k0
        c2 = high_0 ^ c3 ^ k1
        c1 = low_1
        c3 = low_0
        k0 += weyl_0
        k1 += weyl_1
    return c0, c1, c2, c3


@triton.jit
def words_of_groups(groups, seed_low, seed_high, sample_index, offset):
    """uint32 [4 * G] for int32 groups [G] of four neighbouring ids: word 4 * j + i is that of id
    4 * groups[j] + i. The other arguments are uint32 scalars.
    """
    c0 = groups.to(tl.uint32)
    zeros = tl.zeros_like(c0)
    w0, w1, w2, w3 = philox4x32(c0, zeros + offset, zeros + sample_index, zeros, seed_low, seed_high)
    # join puts its arguments in a new last dimension: ((0, 2), (1, 3)) flattens to 0, 1, 2, 3.
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(pairs, (4 * groups.shape[0],))


@triton.jit
def log2_positive(x, INTERPRET: tl.constexpr):
    """log2 of normal fp32 x > 0, one instruction; relative error 2^-22, between 1/2 and 2 absolute error."""
    if INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def gumbel(words, INTERPRET: tl.constexpr):
    """fp32 -log(-log(u)), u = (word + 1/2) / 2^32, of uint32 words.

    u close to 1 is told from 1 by the complement x = 1 - u, which is as exact as u is close to 0: there
    -log(u) = x + x^2 / 2 + x^3 / 3 + ...
    """
    is_upper = words >= 0x80000000
    nearest = tl.where(is_upper, words ^ 0xFFFFFFFF, words).to(tl.float32) + 0.5
    x = nearest * _TWO_TO_MINUS_32
    u = tl.where(is_upper, 1.0 - x, x)
    series = tl.fma(x, 0.2, 0.25)
    series = tl.fma(x, series, 1.0 / 3.0)
    series = tl.fma(x, series, 0.5)
    series = x * tl.fma(x, series, 1.0)
    is_close = is_upper & (x < _SMALL)
    y = tl.where(is_close, series, log2_positive(u, INTERPRET) * -_LN_2)
    return log2_positive(y, INTERPRET) * -_LN_2
