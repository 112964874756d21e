"""Words of a packed weight become the operand of the tensor core, by the instructions that a device runs.

The interpreter emulates the instructions, so that their constants and the order of their operands are tested
without a device.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from services.engine.kernels.gpu.rounding import TRITON_DTYPES
from services.engine.kernels.gpu.w4a16_repack import pack
from services.engine.kernels.gpu.w4a16_tile import dequantize_tile

OUTPUTS, INPUTS = 128, 128


@triton.jit
def _tile_kernel(
    words_ptr,
    params_ptr,
    weight_ptr,
    scale_ptr,
    DTYPE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    spans: tl.constexpr = K // SPAN
    n, k, span = tl.arange(0, N), tl.arange(0, K), tl.arange(0, spans)
    words = tl.load(words_ptr + tl.arange(0, N * K // 8))
    params = tl.load(params_ptr + n[:, None] * spans + span[None, :])
    weight, scale = dequantize_tile(words, params, DTYPE, N, K, SPAN, HAS_SCALE, False)
    tl.store(weight_ptr + n[:, None] * K + k[None, :], weight)
    tl.store(scale_ptr + n[:, None] * spans + span[None, :], scale.reshape(N, spans))


@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize("span", [128, 32, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_instructions_give_every_value_less_its_zero_point(
    device: str, dtype: torch.dtype, span: int, has_scale: bool
) -> None:
    generator = torch.Generator().manual_seed(span)
    values = torch.randint(16, (INPUTS, OUTPUTS), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (INPUTS // span, OUTPUTS), generator=generator, dtype=torch.uint8)
    scales = ((torch.rand(zeros.shape, generator=generator) - 0.5) * 0.1).half()
    packed = pack(values.to(device), zeros.to(device), scales.to(device), dtype)
    weight = torch.full((OUTPUTS, INPUTS), float("nan"), dtype=dtype, device=device)
    scale = torch.full((OUTPUTS, INPUTS // span), float("nan"), device=device)
    _tile_kernel[(1,)](
        packed.words, packed.params, weight, scale, TRITON_DTYPES[dtype], OUTPUTS, INPUTS, span, has_scale
    )
    wide = zeros.repeat_interleave(span, 0)
    expected = (values.float() - wide.float()).to(dtype)
    if has_scale:
        # The scale is rounded to the weights' type first, and their product once.
        expected = expected * scales.to(dtype).repeat_interleave(span, 0)
    assert torch.equal(weight.cpu(), expected.t())
    assert torch.equal(scale.cpu(), scales.float().t())
