"""Device functions: loaded words of a packed 4-bit weight to the left operand of a tensor core.

A 4-bit value v becomes a 16-bit float without a conversion: its bits OR-ed into the mantissa of 128 (bf16) or
1024 (fp16) are the float 128 + v. Adding -(128 + z) is exact, whatever the zero point z; the scale, where the
weight is to have it, costs one rounding. Two floats share a register and an instruction.

ASM takes the instructions by name, on a GPU; without it the same is said in Triton, computes in fp32, and
runs in the interpreter too. Knows the layout of `w4a16_repack`, no matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.rounding import round_to


@triton.jit
def _magic_words(words, SHIFT: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr):
    """Two 16-bit floats a word: the magic number + the nibbles at SHIFT and SHIFT + 16."""
    shifted = words >> SHIFT if SHIFT > 0 else words
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000f000f, $2, 0xEA;",
            "=r,r,r",
            [shifted, MAGIC],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (shifted & 0x000F000F) | MAGIC


@triton.jit
def _multiply_add_pairs(a, b, c, IS_BF16: tl.constexpr):
    """a * b + c on two 16-bit floats a word, each rounded once."""
    if IS_BF16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def split_pairs(words, DTYPE: tl.constexpr):
    """The low and the high 16-bit floats of words."""
    low = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = ((words >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    return low, high


@triton.jit
def join_planes(words, MAGIC: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loaded words -> magic words [BLOCK_N, BLOCK_K / 64, 2, 2, 8], inputs in order. Moves no data."""
    NUM_BLOCKS: tl.constexpr = BLOCK_K // 64
    words = words.reshape(BLOCK_N // 128, NUM_BLOCKS, 2, 4, 8, 4, 2, 2)
    words = words.permute(0, 2, 3, 7, 4, 1, 6, 5).reshape(BLOCK_N, NUM_BLOCKS, 8)
    first = tl.join(_magic_words(words, 0, MAGIC, ASM), _magic_words(words, 8, MAGIC, ASM))
    second = tl.join(_magic_words(words, 4, MAGIC, ASM), _magic_words(words, 12, MAGIC, ASM))
    return tl.join(first, second).permute(0, 1, 3, 4, 2)


@triton.jit
def _zero_and_scale(params, IS_FP16: tl.constexpr, ASM: tl.constexpr):
    """(-(magic + zero point), scale in fp32) of params; the former as two 16-bit floats a word with ASM."""
    bits = (params >> 16).to(tl.int16)
    scale = bits.to(tl.float16, bitcast=True).to(tl.float32)
    if ASM:
        minus = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x1010;", "=r,r", [params], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = (params & 0xFFFF).to(tl.int16)
        minus = low.to(tl.float16 if IS_FP16 else tl.bfloat16, bitcast=True).to(tl.float32)
    return minus, scale


@triton.jit
def _scale_pairs(scale, params, IS_FP16: tl.constexpr):
    """A scale, twice in a word, in the weights' 16-bit type."""
    if IS_FP16:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x3232;", "=r,r", [params], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [scale], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _per_span(x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr):
    """One number a span of inputs [BLOCK_N, BLOCK_K / SPAN], shaped to broadcast over magic words."""
    if SPAN >= BLOCK_K:
        return x.reshape(BLOCK_N, 1, 1, 1, 1)
    elif SPAN == 64:
        return x.reshape(BLOCK_N, BLOCK_K // 64, 1, 1, 1)
    elif SPAN == 32:
        return x.reshape(BLOCK_N, BLOCK_K // 64, 2, 1, 1)
    else:
        return x.reshape(BLOCK_N, BLOCK_K // 64, 2, 2, 1)


@triton.jit
def dequantize_tile(
    words,
    params,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """(weights [BLOCK_N, BLOCK_K], fp32 scales [BLOCK_N, BLOCK_K / SPAN]) of loaded words and params.

    The weights are v - z, exactly, or with HAS_SCALE that times the scale. They have DTYPE; in the
    interpreter fp32, rounded to DTYPE where a scale made that necessary.
    """
    IS_FP16: tl.constexpr = tl.float16 == DTYPE
    pairs = join_planes(words, 0x64006400 if IS_FP16 else 0x43004300, not INTERPRET, BLOCK_N, BLOCK_K)
    minus, scale = _zero_and_scale(params, IS_FP16, not INTERPRET)
    minus = _per_span(minus, BLOCK_N, BLOCK_K, SPAN)
    if not INTERPRET:
        # times 1.0: the addition of pairs alone is not in sm_80.
        pairs = _multiply_add_pairs(pairs, 0x3C003C00 if IS_FP16 else 0x3F803F80, minus, not IS_FP16)
        if HAS_SCALE:
            twice = _per_span(_scale_pairs(scale, params, IS_FP16), BLOCK_N, BLOCK_K, SPAN)
            pairs = _multiply_add_pairs(pairs, twice, 0, not IS_FP16)
        low, high = split_pairs(pairs.reshape(BLOCK_N, BLOCK_K // 2), DTYPE)
    else:
        low, high = split_pairs(pairs, tl.float16 if IS_FP16 else tl.bfloat16)
        low, high = low.to(tl.float32) + minus, high.to(tl.float32) + minus
        if HAS_SCALE:
            wide = _per_span(scale, BLOCK_N, BLOCK_K, SPAN)
            low = round_to(low * wide, DTYPE, INTERPRET).to(tl.float32)
            high = round_to(high * wide, DTYPE, INTERPRET).to(tl.float32)
        low, high = low.reshape(BLOCK_N, BLOCK_K // 2), high.reshape(BLOCK_N, BLOCK_K // 2)
    weight = tl.join(low, high).reshape(BLOCK_N, BLOCK_K)
    if not INTERPRET:
        weight = _keep_layout(weight, IS_FP16)
    return weight, scale


@triton.jit
def _keep_layout(weight, IS_FP16: tl.constexpr):
    """The weight itself. On sm_100 the compiler would push the left operand's shared-memory layout back
    through the reshape before it, and fail; a copy that the assembler drops stops it.
    """
    if IS_FP16:
        return tl.inline_asm_elementwise(
            "mov.b16 $0, $1;", "=h,h", [weight], dtype=tl.float16, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "mov.b16 $0, $1;", "=h,h", [weight], dtype=tl.bfloat16, is_pure=True, pack=1
        )
