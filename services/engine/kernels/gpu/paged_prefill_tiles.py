"""Tiles of K and V as the tensor cores take them, from a cache of any format. Device functions only.

A prefill program multiplies every tile with up to 128 query vectors, so a quantised tile is dequantised once,
to the query's dtype, as fp32 s * u + m with one rounding, and is then multiplied like any other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.kv_codes import code_plane, operand_unit, plane_factor


@triton.jit
def load_tile(
    base_ptr,
    params_ptr,
    slots,
    params,
    columns,
    mask,
    is_key,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    USE_CVT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """[TILE, BLOCK_D] of K or V in DTYPE (fp32 where the interpreter multiplies), zero where no key is.

    Args:
        base_ptr: of values; of int32 words of codes when FORMAT is not "float".
        params_ptr: of scales and minimums, read only for codes.
        slots, params: int [TILE], where each key's vector and its scale lie behind the pointers.
        columns: [values or words], positions within the vector.
        mask: [TILE, values or words], what is read; is_key [TILE].
    """
    stored = tl.load(base_ptr + slots[:, None] + columns[None, :], mask=mask, other=0)
    if FORMAT == "float":
        tile = stored
    else:
        packed = tl.load(params_ptr + params, mask=is_key, other=0)
        tile = _dequantize(stored, packed, FORMAT, USE_CVT)
    if INTERPRET:
        # Rounded as on a device, and multiplied in fp32: the interpreter's half-precision products are not.
        return tile.to(DTYPE).to(tl.float32)
    else:
        return tile.to(DTYPE)


@triton.jit
def _dequantize(words, packed, FORMAT: tl.constexpr, USE_CVT: tl.constexpr):
    """fp32 [TILE, codes] in the order of head_dim, of words [TILE, words] and params [TILE]."""
    scale = (packed << 16).to(tl.float32, bitcast=True) * operand_unit(FORMAT, USE_CVT)
    minimum = (packed & -65536).to(tl.float32, bitcast=True)
    if FORMAT == "int4":
        # Element j + 4h is half h of plane j; the last axis of a join counts fastest.
        first = _halves(words, scale, minimum, 0, FORMAT, USE_CVT)
        second = _halves(words, scale, minimum, 1, FORMAT, USE_CVT)
        third = _halves(words, scale, minimum, 2, FORMAT, USE_CVT)
        fourth = _halves(words, scale, minimum, 3, FORMAT, USE_CVT)
        low = tl.join(tl.join(first[0], first[1]), tl.join(third[0], third[1]))
        high = tl.join(tl.join(second[0], second[1]), tl.join(fourth[0], fourth[1]))
        return tl.join(low, high).reshape(words.shape[0], 8 * words.shape[1])
    else:
        first = _halves(words, scale, minimum, 0, FORMAT, USE_CVT)
        second = _halves(words, scale, minimum, 1, FORMAT, USE_CVT)
        if FORMAT == "int8":
            # Element j + 2h.
            pairs = tl.join(tl.join(first[0], first[1]), tl.join(second[0], second[1]))
        else:
            # Element 2j + h.
            pairs = tl.join(tl.join(first[0], second[0]), tl.join(first[1], second[1]))
        return pairs.reshape(words.shape[0], 4 * words.shape[1])


@triton.jit
def _halves(words, scale, minimum, J: tl.constexpr, FORMAT: tl.constexpr, USE_CVT: tl.constexpr):
    """Two fp32 tensors of the shape of `words`: the values of plane J's low and high halves."""
    pairs = code_plane(words, J, FORMAT, USE_CVT)
    low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = ((pairs >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    step = (scale * plane_factor(J, FORMAT))[:, None]
    if FORMAT == "fp8":
        return low * step, high * step
    else:
        return tl.fma(low, step, minimum[:, None]), tl.fma(high, step, minimum[:, None])
