"""A packed 4-bit weight written out as [outputs, inputs], for products of many rows.

From a few hundred rows on, a product is bound by arithmetic and a vendor's matmul is the better engine; the
weight is then written to scratch once per call, each element (v - z) * s rounded once. Any group size. Knows
one packed weight; scratch and matmul belong to `w4a16_linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.rounding import TRITON_DTYPES, is_interpreting, round_to
from services.engine.kernels.gpu.w4a16_repack import TILE_INPUTS, TILE_OUTPUTS, PackedWeight
from services.engine.kernels.gpu.w4a16_tile import join_planes, split_pairs

_NUM_WARPS = 4


@triton.jit
def _w4a16_dequantize_kernel(
    words_ptr,
    params_ptr,
    out_ptr,
    in_features,
    out_features,
    param_rows,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    IS_FP16: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program writes 128 outputs by 64 inputs. SPAN is 1 where no span divides the group."""
    PER_ROW: tl.constexpr = 128 // SPAN if SPAN > 1 else 1
    STEP: tl.constexpr = 64 if SPAN > 64 else SPAN
    TYPE: tl.constexpr = tl.float16 if IS_FP16 else tl.bfloat16
    block, tile = tl.program_id(0), tl.program_id(1)
    base = (tile.to(tl.int64) * tl.num_programs(0) + block) * 1024
    words = tl.load(words_ptr + base + tl.arange(0, 1024))
    pairs = join_planes(words, 0x64006400 if IS_FP16 else 0x43004300, False, 128, 64)
    low, high = split_pairs(pairs, TYPE)
    weight = tl.join(low.to(tl.float32), high.to(tl.float32)).reshape(128, 64 // STEP, STEP)

    row = tl.arange(0, 128)
    first = block * 64 + tl.arange(0, 64 // STEP) * STEP
    if PER_ROW > 1:
        offsets = (first // 128 * (128 * PER_ROW) + first % 128 // SPAN)[None, :] + row[:, None] * PER_ROW
    else:
        # Inputs in the padding may lie behind the last group; they are not stored.
        offsets = tl.minimum(first // GROUP, param_rows - 1)[None, :] * 128 + row[:, None]
    params = tl.load(params_ptr + tile.to(tl.int64) * param_rows * (128 * PER_ROW) + offsets)
    minus = (params & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    scale = (params >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    weight = ((weight + minus[:, :, None]) * scale[:, :, None]).reshape(128, 64)

    k = block * 64 + tl.arange(0, 64)
    n = tile * 128 + row
    is_output = n < out_features
    if IS_INTERLEAVED:
        half = out_features // 2
        column = (n // 16) * 8 + n % 8
        is_output = column < half
        n = column + (n // 8 % 2) * half
    pointers = out_ptr + n[:, None].to(tl.int64) * in_features + k[None, :]
    mask = is_output[:, None] & (k < in_features)[None, :]
    tl.store(pointers, round_to(weight, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


def w4a16_dequantize(packed: PackedWeight, out: Tensor) -> Tensor:
    """Write the weight to out [out, in], contiguous, in the type of the activations. ValueError if not."""
    shape = (packed.out_features, packed.in_features)
    if out.shape != shape or not out.is_contiguous() or out.dtype not in TRITON_DTYPES:
        raise ValueError(f"a weight {shape} cannot be written to {out.dtype} {tuple(out.shape)}")
    tiles, blocks = packed.words.shape[:2]
    _w4a16_dequantize_kernel[(blocks, tiles)](
        packed.words,
        packed.params,
        out,
        packed.in_features,
        packed.out_features,
        packed.params.shape[1],
        GROUP=packed.group_stride,
        SPAN=packed.span or 1,
        IS_INTERLEAVED=packed.is_interleaved,
        IS_FP16=packed.dtype == torch.float16,
        INTERPRET=is_interpreting(),
        num_warps=_NUM_WARPS,
    )
    return out


def compile_cases() -> list[CompileCase]:
    """Every span, and gate and up side by side."""
    cases = []
    for group, span, is_interleaved in (
        (128, 128, False),
        (64, 64, False),
        (32, 32, False),
        (16, 16, False),
        (24, 1, False),
        (128, 128, True),
    ):
        cases.append(
            CompileCase(
                name=f"w4a16_dequantize/group{group}{'/gate_up' if is_interleaved else ''}",
                kernel=_w4a16_dequantize_kernel,
                signature={
                    "words_ptr": "*i32",
                    "params_ptr": "*i32",
                    "out_ptr": "*bf16",
                    "in_features": "i32",
                    "out_features": "i32",
                    "param_rows": "i32",
                },
                constexprs={
                    "GROUP": group,
                    "SPAN": span,
                    "IS_INTERLEAVED": is_interleaved,
                    "IS_FP16": False,
                    "INTERPRET": False,
                },
                num_warps=_NUM_WARPS,
                num_stages=1,
                unaligned=frozenset({"param_rows"}),
                elements_per_iteration=TILE_OUTPUTS * TILE_INPUTS,
            )
        )
    return cases
