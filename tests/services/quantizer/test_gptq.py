"""The sweep and what refines it: better than rounding, never a step back, and whatever the inputs."""

import pytest
import torch

from services.quantizer.errors import QuantizerError
from services.quantizer.gptq import factorize, sweep
from services.quantizer.grid import full_range, grid, round_to_nearest
from services.quantizer.refinement import dequantized, descend, refit
from services.quantizer.statistics import output_energy

GROUP = 32


def problem(seed=0, rows=24, columns=192, tokens=500):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs


def swept(weight, gram):
    scales, zeros = grid(*full_range(weight.unflatten(1, (-1, GROUP))))
    return sweep(weight, factorize(gram), scales, zeros), scales, zeros


def by_row(difference, gram):
    return ((difference @ gram) * difference).sum(1)


def test_the_factor_is_that_of_the_damped_inverse():
    _, inputs = problem()
    gram = inputs.T @ inputs
    factor = factorize(gram)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    assert (factor.upper == factor.upper.triu()).all()
    product = factor.solve(damped)
    assert torch.allclose(product, torch.eye(len(gram)), atol=1e-3)


def test_the_sweep_is_the_textbooks_column_by_column():
    """Against the update as published: quantize a column, take its error from all later ones, in fp64."""
    weight, inputs = problem(rows=8, columns=160)
    gram = inputs.T @ inputs
    values, scales, zeros = swept(weight, gram)
    factor = factorize(gram)
    left, upper = weight.double()[:, factor.order], factor.upper.double()
    expected = torch.empty_like(values)
    for j, column in enumerate(factor.order.tolist()):
        scale, zero = scales[:, column // GROUP], zeros[:, column // GROUP]
        value = (torch.round(left[:, j] / scale) + zero).clamp(0, 15)
        error = (left[:, j] - (value - zero) * scale) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
        expected[:, column] = value.float()
    assert (values != expected).float().mean() < 0.01  # a tie may fall otherwise in fp32


@pytest.mark.parametrize("seed", range(3))
def test_each_step_leaves_less_error(seed):
    weight, inputs = problem(seed)
    gram = inputs.T @ inputs
    values, scales, zeros = swept(weight, gram)
    assert ((values >= 0) & (values <= 15) & (values == values.round())).all()
    rounded = round_to_nearest(weight, GROUP).dequantize()
    error = by_row(dequantized(values, scales, zeros) - weight, gram)
    assert error.sum() < 0.6 * output_energy(rounded - weight, gram)
    for _ in range(2):
        scales, zeros = refit(values, weight, gram, scales, zeros)
        assert torch.equal(scales, scales.half().float())
        assert ((zeros >= 0) & (zeros <= 15)).all()
        better = by_row(dequantized(values, scales, zeros) - weight, gram)
        assert (better <= error * (1 + 1e-4)).all()
        values = descend(values, weight, gram, scales, zeros)
        best = by_row(dequantized(values, scales, zeros) - weight, gram)
        assert (best <= better * (1 + 1e-4)).all()
        assert best.sum() < 0.99 * error.sum()
        error = best


def test_no_single_integer_can_be_bettered_in_the_end():
    weight, inputs = problem()
    gram = inputs.T @ inputs
    values, scales, zeros = swept(weight, gram)
    for _ in range(30):
        values = descend(values, weight, gram, scales, zeros)
    least = by_row(dequantized(values, scales, zeros) - weight, gram)
    for column in range(0, weight.shape[1], 7):
        for step in (-1, 1):
            moved = values.clone()
            moved[:, column] = (moved[:, column] + step).clamp(0, 15)
            error = by_row(dequantized(moved, scales, zeros) - weight, gram)
            assert (error >= least * (1 - 1e-4)).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_token_is_enough_to_go_on(tokens):
    weight, inputs = problem(tokens=tokens)
    inputs[:, ::5] = 0.0
    gram = inputs.T @ inputs
    values, scales, zeros = swept(weight, gram)
    assert torch.isfinite(values).all()
    rounded = round_to_nearest(weight, GROUP).dequantize()
    assert output_energy(dequantized(values, scales, zeros) - weight, gram) <= output_energy(
        rounded - weight, gram
    )
    # A column that nothing reaches keeps its nearest integer.
    assert torch.equal(dequantized(values, scales, zeros)[:, ::5], rounded[:, ::5])


def test_inputs_without_numbers_are_refused():
    with pytest.raises(QuantizerError, match="not finite"):
        factorize(torch.full((32, 32), float("nan")))
