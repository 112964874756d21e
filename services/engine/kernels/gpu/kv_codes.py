"""Turns words of a quantised cache into operands of the tensor cores: jit helpers for attention kernels.

A word is an int32 of a row of codes: four int8 or fp8 codes, or eight int4 codes, the first in the lowest
bits. An operand is an fp16 number, and a pair of them fills an int32, the first in the low half.

An int8 or int4 code in the low bits of an fp16 number *is* a number: a subnormal, code x 2^-24, which tensor
cores multiply at full precision. So a mask or a byte permutation is all that unpacking takes: no conversion,
and no bias that a sum would have to take off again, hence nothing that cancels. Every second int4 code stays
four bits higher, code x 2^-20, which saves its shift. The powers of two are made good in fp32: `operand_unit`
for all of a format, `plane_factor` or `row_factor` for the int4 codes in between.

Two ways to pair codes, each for the order in which an operand wants them:

    planes  codes of one token, for a product over head_dim (q.K): plane j of a word holds the elements
            int8: 4w + j, 4w + j + 2    int4: 8w + j, 8w + j + 4    fp8: 4w + 2j, 4w + 2j + 1
    pairs   one element of two neighbouring tokens, for a product over tokens (p.V)

An order of head_dim is as good as another inside a dot product, so a kernel loads its query by `plane_column`
and stores its output by `pair_row`. These helpers know nothing of scales, minimums, tokens or blocks.

USE_CVT: fp8 by the conversion instruction (sm_89 and later, not the interpreter); without it by integers, and
then a code that means NaN becomes a finite number. USE_PERMUTE: bytes moved by one instruction each, written
as inline assembly because the compiler takes the plain form apart (not the interpreter).
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
    """Codes in a word; 2 numbers for a format of 16 bits."""
    return {"int4": 8, "int8": 4, "fp8": 4}.get(kv_format, 2)


@triton.constexpr_function
def operand_unit(kv_format: str, use_cvt: bool) -> float:
    """What a dot product of operands is multiplied with to be one of codes."""
    if kv_format == "fp8":
        return 1.0 if use_cvt else 2.0**8
    return 2.0**24 if kv_format in ("int8", "int4") else 1.0


@triton.constexpr_function
def plane_factor(plane: int, kv_format: str) -> float:
    """What the other operand of a plane is multiplied with, so that all planes have the same unit."""
    return 2.0**-4 if kv_format == "int4" and plane % 2 == 1 else 1.0


@triton.jit
def plane_column(index, J: tl.constexpr, FORMAT: tl.constexpr):
    """Element of head_dim that column `index` (0 .. 2 * words - 1) of plane J holds."""
    if FORMAT == "int8":
        return index // 2 * 4 + J + index % 2 * 2
    elif FORMAT == "int4":
        return index // 2 * 8 + J + index % 2 * 4
    else:
        return index // 2 * 4 + 2 * J + index % 2


@triton.jit
def code_plane(words, J: tl.constexpr, FORMAT: tl.constexpr, USE_CVT: tl.constexpr):
    """int32 of the shape of `words`: plane J, a pair of operands each."""
    if FORMAT == "int8":
        return (words >> (8 * J)) & 0x00FF00FF
    elif FORMAT == "int4":
        # The odd planes' nibbles stay where they are, four bits up: one shift serves two planes.
        return (words >> (8 * (J // 2))) & (0x00F000F0 if J % 2 == 1 else 0x000F000F)
    elif USE_CVT:
        return _fp8_pair(words, J)
    else:
        # Bytes 2J and 2J + 1 into the high halves' top: sign, four bits of exponent, three of mantissa.
        pair = words if J == 1 else words << 16
        high = (pair & -16777216) | ((pair & 0x00FF0000) >> 8)
        # The exponent moves one bit down under the sign; fp16's bias is greater by 8, hence 2^-8.
        return (high & -2147450880) | ((high >> 1) & 0x3F803F80)


@triton.jit
def plane_tile(
    words, J: tl.constexpr, FORMAT: tl.constexpr, USE_CVT: tl.constexpr, USE_PERMUTE: tl.constexpr
):
    """fp16 [lanes, rows, 2 * words] of int32 [lanes, rows, words]: plane J in the order of `plane_column`.

    In machine code the pairs stay in the registers that `code_plane` left them in.
    """
    if FORMAT == "int8" and USE_PERMUTE:
        pairs = _permute_zero(words, 0x4341 if J == 1 else 0x4240)
    else:
        pairs = code_plane(words, J, FORMAT, USE_CVT)
    return _halves(pairs, tl.float16).reshape(words.shape[0], words.shape[1], 2 * words.shape[2])


@triton.jit
def pair_row(index, WORDS: tl.constexpr, FORMAT: tl.constexpr):
    """Element of head_dim that row `index` of a `pair_tile` of WORDS words holds.

    Eight neighbouring rows are held by eight neighbouring threads. Their words are up to four apart, so that
    a thread's words are neighbours and it reads them at once.
    """
    NEAR: tl.constexpr = min(WORDS // 8, 4)
    word = index % WORDS // (8 * NEAR) * (8 * NEAR) + index % 8 * NEAR + index // 8 % NEAR
    return word * codes_per_word(FORMAT) + index // WORDS


@triton.jit
def row_factor(index, WORDS: tl.constexpr, FORMAT: tl.constexpr, USE_CVT: tl.constexpr):
    """fp32 of the shape of `index`: what turns rows of a product with a `pair_tile` into ones of codes."""
    if FORMAT == "int4":
        return tl.where(index // WORDS % 2 == 1, 2.0**20, 2.0**24)
    else:
        return tl.full(index.shape, operand_unit(FORMAT, USE_CVT), tl.float32)


@triton.jit
def pair_tile(
    even, odd, DTYPE: tl.constexpr, FORMAT: tl.constexpr, USE_CVT: tl.constexpr, USE_PERMUTE: tl.constexpr
):
    """DTYPE [lanes, head_dim, 2 * rows] of int32 [lanes, rows, words]: the words of every even token and of
    the odd one after it, turned so that tokens run along the last axis; the rows as `pair_row` says.

    DTYPE is float16 for codes; a format of 16 bits keeps its own.
    """
    if FORMAT == "int4":
        # Codes 0 .. 3 and 4 .. 7 of both tokens; eight bits on, the even and odd places serve again.
        a = _permute(even, odd, 0x5410, USE_PERMUTE)
        b = _permute(even, odd, 0x7632, USE_PERMUTE)
        c, d = a >> 8, b >> 8
        even_low = tl.join(a & 0x000F000F, b & 0x000F000F)
        even_high = tl.join(c & 0x000F000F, d & 0x000F000F)
        odd_low = tl.join(a & 0x00F000F0, b & 0x00F000F0)
        odd_high = tl.join(c & 0x00F000F0, d & 0x00F000F0)
        pairs = tl.join(tl.join(even_low, even_high), tl.join(odd_low, odd_high))
    elif FORMAT == "int8" or FORMAT == "fp8":
        # Bytes 0, 1 and 2, 3 of both tokens, those of a byte side by side.
        a = _permute(even, odd, 0x5140, USE_PERMUTE)
        b = _permute(even, odd, 0x7362, USE_PERMUTE)
        low = tl.join(
            _byte_pair(a, 0, FORMAT, USE_CVT, USE_PERMUTE), _byte_pair(b, 0, FORMAT, USE_CVT, USE_PERMUTE)
        )
        high = tl.join(
            _byte_pair(a, 1, FORMAT, USE_CVT, USE_PERMUTE), _byte_pair(b, 1, FORMAT, USE_CVT, USE_PERMUTE)
        )
        pairs = tl.join(low, high)
    else:
        pairs = tl.join(_permute(even, odd, 0x5410, USE_PERMUTE), _permute(even, odd, 0x7632, USE_PERMUTE))
    return _turned(_halves(pairs, DTYPE), even.shape[0], even.shape[1], even.shape[2], codes_per_word(FORMAT))


@triton.jit
def _turned(x, LANES: tl.constexpr, PAIRS: tl.constexpr, WORDS: tl.constexpr, CODES: tl.constexpr):
    """[lanes, pairs, words, codes (axes of two), token of the pair] -> [lanes, codes x words, tokens]."""
    NEAR: tl.constexpr = min(WORDS // 8, 4)
    FAR: tl.constexpr = WORDS // (8 * NEAR)
    if CODES == 2:
        y = tl.permute(x.reshape(LANES, PAIRS, FAR, 8, NEAR, 2, 2), (0, 5, 2, 4, 3, 1, 6))
    elif CODES == 4:
        y = tl.permute(x.reshape(LANES, PAIRS, FAR, 8, NEAR, 2, 2, 2), (0, 5, 6, 2, 4, 3, 1, 7))
    else:
        y = tl.permute(x.reshape(LANES, PAIRS, FAR, 8, NEAR, 2, 2, 2, 2), (0, 5, 6, 7, 2, 4, 3, 1, 8))
    return y.reshape(LANES, CODES * WORDS, 2 * PAIRS)


@triton.jit
def _halves(pairs, DTYPE: tl.constexpr):
    """DTYPE [..., 2] of int32 [...]: free in machine code, the two halves lie in one register already."""
    low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = ((pairs >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _byte_pair(
    words, J: tl.constexpr, FORMAT: tl.constexpr, USE_CVT: tl.constexpr, USE_PERMUTE: tl.constexpr
):
    """Bytes 2J and 2J + 1 as a pair of operands."""
    if FORMAT == "fp8":
        return code_plane(words, J, FORMAT, USE_CVT)
    elif USE_PERMUTE:
        return _permute_zero(words, 0x4342 if J == 1 else 0x4140)
    else:
        pair = words >> (16 * J)
        return (pair & 0xFF) | ((pair & 0xFF00) << 8)


@triton.jit
def _permute(low, high, SELECTOR: tl.constexpr, USE_PERMUTE: tl.constexpr):
    """int32 of four bytes of `low` (bytes 0 .. 3) and `high` (4 .. 7): nibble i of SELECTOR names byte i."""
    if USE_PERMUTE:
        return tl.inline_asm_elementwise(
            _permute_asm("$2", SELECTOR), "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low_half = _byte(low, high, SELECTOR & 7) | (_byte(low, high, (SELECTOR >> 4) & 7) << 8)
        high_half = _byte(low, high, (SELECTOR >> 8) & 7) | (_byte(low, high, (SELECTOR >> 12) & 7) << 8)
        return low_half | (high_half << 16)


@triton.jit
def _byte(low, high, INDEX: tl.constexpr):
    return ((high if INDEX >= 4 else low) >> (8 * (INDEX % 4))) & 0xFF


@triton.jit
def _permute_zero(words, SELECTOR: tl.constexpr):
    """int32 of four bytes of `words` (bytes 0 .. 3) and zeros (4 .. 7)."""
    return tl.inline_asm_elementwise(
        _permute_asm("0", SELECTOR), "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _fp8_pair(words, J: tl.constexpr):
    """Bytes 2J and 2J + 1, float8 e4m3, as a pair of fp16 numbers."""
    return tl.inline_asm_elementwise(_convert_asm(J), "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def _permute_asm(high: str, selector: int) -> str:
    return f"prmt.b32 $0, $1, {high}, {selector:#x};"


@triton.constexpr_function
def _convert_asm(half: int) -> str:
    return f"{{ .reg .b16 h0, h1; mov.b32 {{h0, h1}}, $1; cvt.rn.f16x2.e4m3x2 $0, h{half}; }}"
