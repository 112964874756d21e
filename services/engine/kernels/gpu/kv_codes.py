"""Turns words of a quantised cache into operands of the tensor cores: jit helpers that attention kernels share.

A word is an int32 of a row of codes: four int8 or fp8 codes, or eight int4 codes, the first in the lowest bits.
Its codes come out as *planes*: plane j of a word is an int32 that holds two fp16 numbers, h = 0 in the low half
and h = 1 in the high half, made with one or two instructions:

    format  planes  operand (j, h) of word w is element   operand
    int8    2       4w + j + 2h                           code x 2^-24
    int4    4       8w + j + 4h                           code x 2^-24 for even j, code x 2^-20 for odd j
    fp8     2       4w + 2j + h                           code, or code x 2^-8 without the conversion instruction

An int8 or int4 code in the low bits of an fp16 number *is* a number: a subnormal, which the tensor cores take
at full precision. No bias is added that a sum would have to take off again, and nothing cancels. The powers of
two are made good in fp32: `operand_unit` for all, `plane_factor` for a plane (folded into the query, exactly)
or `column_factor` for a column (of the output).

An order of head_dim is as good as another inside a dot product, so a kernel loads its query by `plane_column`
and stores its output by `tile_column`. These helpers know nothing of scales, minimums, tokens or blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def num_planes(kv_format: str) -> int:
    """Planes of a word."""
    return 4 if kv_format == "int4" else 2


@triton.constexpr_function
def codes_per_word(kv_format: str) -> int:
    """Codes in a word."""
    return 8 if kv_format == "int4" else 4


@triton.constexpr_function
def operand_unit(kv_format: str, use_cvt: bool) -> float:
    """What a dot product of operands is multiplied with to be one of codes."""
    if kv_format == "fp8":
        return 1.0 if use_cvt else 2.0**8
    return 2.0**24


@triton.constexpr_function
def plane_factor(plane: int, kv_format: str) -> float:
    """What the other operand of a plane is multiplied with, so that all planes have the same unit."""
    return 2.0**-4 if kv_format == "int4" and plane % 2 == 1 else 1.0


@triton.jit
def plane_column(index, J: tl.constexpr, FORMAT: tl.constexpr):
    """Element of head_dim that column `index` (0 .. 2 * words - 1) of plane J holds."""
    if FORMAT == "int8":
        return index // 2 * 4 + J + index % 2 * 2
    if FORMAT == "int4":
        return index // 2 * 8 + J + index % 2 * 4
    return index // 2 * 4 + 2 * J + index % 2


@triton.jit
def tile_column(index, FORMAT: tl.constexpr):
    """Element of head_dim that column `index` (0 .. head_dim - 1) of a `code_tile` holds."""
    if FORMAT == "int8":
        return index // 4 * 4 + index // 2 % 2 + index % 2 * 2
    if FORMAT == "int4":
        return index // 8 * 8 + index // 2 % 4 + index % 2 * 4
    return index


@triton.jit
def column_factor(index, FORMAT: tl.constexpr):
    """fp32, what column `index` of a product with a `code_tile` is multiplied with, beside `operand_unit`."""
    if FORMAT == "int4":
        return tl.where(index // 2 % 2 == 1, 0.0625, 1.0)
    return tl.where(index >= 0, 1.0, 0.0)


@triton.jit
def code_plane(words, J: tl.constexpr, FORMAT: tl.constexpr, USE_CVT: tl.constexpr):
    """int32 of the shape of `words`: plane J, two fp16 numbers each.

    USE_CVT: take the conversion instruction for fp8 (sm_89 and later, not the interpreter). Without it, an fp8
    NaN becomes a finite number; no cache of ours holds one in a slot that is read.
    """
    if FORMAT == "int8":
        return (words >> (8 * J)) & 0x00FF00FF
    if FORMAT == "int4":
        # The odd planes' nibbles stay where they are, four bits up: one shift serves two planes.
        return (words >> (8 * (J // 2))) & (0x00F000F0 if J % 2 == 1 else 0x000F000F)
    if USE_CVT:
        return _fp8_pair(words, J)
    # Bytes 2J and 2J + 1 into the high halves' top: sign, four bits of exponent, three of mantissa.
    pair = words if J == 1 else words << 16
    high = (pair & -16777216) | ((pair & 0x00FF0000) >> 8)
    # The exponent moves one bit down under the sign; fp16's bias is greater by 8, hence 2^-8.
    return (high & -2147450880) | ((high >> 1) & 0x3F803F80)


@triton.jit
def _fp8_pair(words, J: tl.constexpr):
    if J == 0:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, low; }",
            "=r,r",
            [words],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, high; }",
        "=r,r",
        [words],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _halves(pairs):
    """fp16 [..., 2] of int32 [...]: free in machine code, the two halves lie in one register already."""
    low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = ((pairs >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def plane_tile(words, J: tl.constexpr, FORMAT: tl.constexpr, USE_CVT: tl.constexpr):
    """fp16 [..., 2 * words] of int32 [..., words] (2 or 3 dimensions): plane J, its columns as `plane_column`
    says.

    The form for an operand that goes from words to the tensor cores in registers.
    """
    halves = _halves(code_plane(words, J, FORMAT, USE_CVT))
    if len(words.shape) == 2:
        return halves.reshape(words.shape[0], 2 * words.shape[1])
    return halves.reshape(words.shape[0], words.shape[1], 2 * words.shape[2])


@triton.jit
def code_tile(words, FORMAT: tl.constexpr, USE_CVT: tl.constexpr):
    """fp16 [..., head_dim] of int32 [..., words] (2 or 3 dimensions): all planes, the columns as `tile_column`
    says.

    The form for an operand that is written to shared memory.
    """
    first = code_plane(words, 0, FORMAT, USE_CVT)
    second = code_plane(words, 1, FORMAT, USE_CVT)
    if FORMAT == "int4":
        third = code_plane(words, 2, FORMAT, USE_CVT)
        fourth = code_plane(words, 3, FORMAT, USE_CVT)
        # The last axis of a join counts fastest: joined this way round, plane j = 2a + b lies at [a, b].
        planes = tl.join(tl.join(first, third), tl.join(second, fourth))
    else:
        planes = tl.join(first, second)
    halves = _halves(planes)
    per_word: tl.constexpr = 8 if FORMAT == "int4" else 4
    if len(words.shape) == 2:
        return halves.reshape(words.shape[0], per_word * words.shape[1])
    return halves.reshape(words.shape[0], words.shape[1], per_word * words.shape[2])
