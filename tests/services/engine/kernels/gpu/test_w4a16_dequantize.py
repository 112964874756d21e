"""The written-out weight is the twin's, transposed and rounded once, for groups of any size."""

from __future__ import annotations

import pytest
import torch

from services.engine.kernels import reference
from services.engine.kernels.gpu.w4a16_dequantize import w4a16_dequantize
from services.engine.kernels.gpu.w4a16_repack import pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("in_features", "out_features", "group", "is_interleaved"),
    [
        (384, 136, 128, False),
        (192, 24, 64, True),
        (160, 200, 32, False),
        (48, 8, 16, False),
        (100, 40, 100, False),
        (72, 24, 24, True),
        (42, 8, 2, False),
        (288, 136, 96, True),
    ],
)
def test_weight_is_the_twins(
    device: str,
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
    group: int,
    is_interleaved: bool,
) -> None:
    generator = torch.Generator().manual_seed(in_features)
    groups = in_features // group
    values = torch.randint(16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (groups, out_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, out_features, generator=generator) * 0.02 + 1e-3).half()
    packed = pack(
        *(part.to(device) for part in (values, zeros, scales)), dtype, is_interleaved=is_interleaved
    )
    out = torch.full((out_features + 1, in_features), float("nan"), dtype=dtype, device=device)
    w4a16_dequantize(packed, out[:out_features])
    expected = reference.dequantize_int4(values, zeros, scales).t().to(dtype)
    assert torch.equal(out[:out_features].cpu(), expected)
    assert bool(out[out_features].isnan().all())


def test_another_shape_is_refused(device: str) -> None:
    zeros = torch.zeros(1, 8, dtype=torch.uint8, device=device)
    packed = pack(zeros.expand(128, 8), zeros, zeros.float(), torch.float16)
    with pytest.raises(ValueError, match="cannot be written"):
        w4a16_dequantize(packed, torch.empty(128, 8, device=device))
    with pytest.raises(ValueError, match="cannot be written"):
        w4a16_dequantize(packed, torch.empty(128, 8, device=device).t())
