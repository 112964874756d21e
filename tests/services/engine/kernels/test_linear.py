"""Linears: 4-bit weights against the dequantised product, and a row's bits in batches of every size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.kernels import ops, reference
from services.engine.kernels.linear import ConcatLinear, Int4Linear
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

FP32 = Numerics(torch.float32, is_deterministic=True)
BF16 = Numerics(torch.bfloat16, is_deterministic=False)


def _int4(in_features: int, out_features: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (in_features // group, out_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(in_features // group, out_features, generator=generator) * 0.02 + 1e-3).half()
    return values, zeros, scales


SHAPES = [(64, 24, 32), (192, 40, 64), (256, 512, 128), (100, 8, 100), (384, 16, 2)]


@pytest.mark.parametrize(("in_features", "out_features", "group"), SHAPES)
def test_int4_weight_is_dequantised_exactly(in_features: int, out_features: int, group: int) -> None:
    values, zeros, scales = _int4(in_features, out_features, group)
    linear = Int4Linear(values, zeros, scales, None, FP32, Scratch())
    assert torch.equal(linear.dequantize(), reference.dequantize_int4(values, zeros, scales))


@pytest.mark.parametrize(("in_features", "out_features", "group"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 33])
def test_int4_linear_equals_dequantise_then_matmul(
    in_features: int, out_features: int, group: int, rows: int
) -> None:
    values, zeros, scales = _int4(in_features, out_features, group)
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(1))
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(2))
    expected = x.double() @ reference.dequantize_int4(values, zeros, scales).double() + bias.double()
    exact = ops.make_int4_linear(values, zeros, scales, bias, FP32, Scratch())
    assert torch.allclose(exact(x).double(), expected, rtol=1e-4, atol=1e-4)
    coarse = ops.make_int4_linear(values, zeros, scales, bias, BF16, Scratch())
    error = (coarse(x.bfloat16()).double() - expected).norm() / expected.norm()
    assert float(error) < 0.02


@pytest.mark.parametrize("kind", ["dense", "int4"])
@pytest.mark.parametrize(
    ("in_features", "out_features", "group"), [(256, 768, 128), (768, 256, 128), (96, 40, 32)]
)
def test_a_rows_bits_do_not_depend_on_its_batch(
    kind: str, in_features: int, out_features: int, group: int
) -> None:
    values, zeros, scales = _int4(in_features, out_features, group)
    if kind == "dense":
        linear = ops.make_dense_linear(reference.dequantize_int4(values, zeros, scales).t(), None, FP32)
    else:
        linear = ops.make_int4_linear(values, zeros, scales, None, FP32, Scratch())
    x = torch.randn(300, in_features, generator=torch.Generator().manual_seed(3))
    whole = linear(x)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(4))
    assert torch.equal(linear(x[order]), whole[order])
    for rows in (1, 2, 3, 5, 15, 16, 17, 64, 255):
        assert torch.equal(linear(x[:rows]), whole[:rows]), f"{rows} rows"


def test_weights_stay_four_bit_in_memory() -> None:
    values, zeros, scales = _int4(256, 512, 128)
    linear = Int4Linear(values, zeros, scales, None, FP32, Scratch())
    assert linear.packed.nbytes == 256 * 512 // 2
    assert linear.num_bytes < 0.54 * 256 * 512


def test_concat_is_each_part_side_by_side() -> None:
    a, b = torch.randn(8, 32), torch.randn(24, 32)
    parts = [ops.make_dense_linear(weight, None, FP32) for weight in (a, b)]
    x = torch.randn(5, 32)
    both = ConcatLinear(parts)
    assert both.out_features == 32
    assert torch.equal(both(x), torch.cat([parts[0](x), parts[1](x)], -1))


def test_a_group_that_does_not_fit_is_refused() -> None:
    values, zeros, scales = _int4(64, 8, 32)
    with pytest.raises(ValueError, match="64 inputs"):
        Int4Linear(values, zeros.repeat(3, 1)[:3], scales.repeat(3, 1)[:3], None, FP32, Scratch())
