"""The grid as stored, and the clip search: never worse than rounding, asymmetric where that helps."""

import pytest
import torch

from services.quantizer.clipping import search_ranges
from services.quantizer.grid import MIN_SCALE, quantize, round_to_nearest
from services.quantizer.statistics import output_energy


def random_problem(seed, rows=24, columns=128, tokens=400, group_size=32):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    weight = torch.randn(rows, columns, generator=generator) ** 3
    return weight, inputs.T @ inputs, inputs, group_size


@pytest.mark.parametrize("low", [-3.0, 0.5, -9.0])
def test_zero_is_always_on_the_grid_and_no_weight_is_far_from_it(low):
    weight = low + 2.0 * torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 0.0
    quantized = round_to_nearest(weight, 32)
    restored = quantized.dequantize()
    assert (restored[:, 0] == 0).all()
    steps = quantized.scales.float().repeat_interleave(32, 1)
    assert ((restored - weight).abs() <= 1.01 * steps).all()


def test_scales_are_clamped_where_fp16_would_be_subnormal():
    quantized = round_to_nearest(torch.full((2, 32), 1e-9), 32)
    assert (quantized.scales.float() == MIN_SCALE).all()
    assert (quantized.dequantize() == 0).all()


def test_the_error_is_that_of_the_stored_scale():
    weight = torch.linspace(-1, 1, 32).expand(4, 32).contiguous()
    quantized = round_to_nearest(weight, 32)
    values, zeros = quantized.values.float(), quantized.zeros.float()
    by_hand = (values - zeros.repeat_interleave(32, 1)) * quantized.scales.float().repeat_interleave(32, 1)
    assert torch.equal(quantized.dequantize(), by_hand)
    assert quantized.scales.dtype == torch.float16


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sweeps", [1, 2])
def test_no_row_is_ever_worse_than_rounding(seed, sweeps):
    weight, gram, inputs, group_size = random_problem(seed)
    searched = quantize(weight, *search_ranges(weight, gram, group_size, sweeps)).dequantize()
    rounded = round_to_nearest(weight, group_size).dequantize()
    exact, after, before = (inputs @ w.T for w in (weight, searched, rounded))
    errors = ((after - exact) ** 2).sum(0), ((before - exact) ** 2).sum(0)
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


def test_the_two_ends_are_shrunk_separately():
    weight = torch.linspace(-1, 1, 32).repeat(4, 1)
    weight[:, -1] = 3.0  # one outlier at the upper end that no input uses much
    gram = torch.eye(32)
    gram[-1, -1] = 1e-4
    low, high = search_ranges(weight, gram, 32)
    assert (high[:, 0] < 2.5).all()
    assert (low[:, 0] < -0.85).all()


def test_the_energy_is_that_of_the_outputs():
    weight, gram, inputs, _ = random_problem(1)
    assert output_energy(weight, gram) == pytest.approx(float(((inputs @ weight.T) ** 2).sum()), rel=1e-4)
