"""Partial sums are added in order, and what follows the product is applied once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from services.engine.kernels.gpu.silu_mul import Activation
from services.engine.kernels.gpu.w4a16_reduce import w4a16_reduce


def _partial(num_splits: int, rows: int, outputs: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_splits * 1000 + rows)
    return torch.randn(num_splits, rows, outputs, generator=generator).to(device)


@pytest.mark.parametrize(
    ("num_splits", "rows", "outputs"), [(1, 1, 8), (2, 3, 136), (7, 2, 1032), (16, 5, 24)]
)
def test_first_split_first(device: str, num_splits: int, rows: int, outputs: int) -> None:
    partial = _partial(num_splits, rows, outputs, device)
    # Of many magnitudes, so that the order of the additions shows in the bits.
    partial *= 10.0 ** (torch.arange(num_splits) * 3 % 7)[:, None, None].to(device)
    out = torch.full((rows + 1, outputs), float("nan"), device=device)
    expected = partial[0].clone()
    for part in partial[1:]:
        expected += part
    assert torch.equal(w4a16_reduce(partial, out[:rows], bias=None, residual=None), expected)
    assert bool(out[rows].isnan().all())


def test_bias_then_residual_rounded_once(device: str) -> None:
    partial = _partial(3, 5, 200, device)
    bias = torch.randn(200, device=device).half()
    residual = (torch.randn(5, 200, device=device) * 100).half()
    out = torch.full((5, 200), float("nan"), dtype=torch.float16, device=device)
    w4a16_reduce(partial, out, bias=bias, residual=residual)
    assert torch.equal(out, (partial.sum(0) + bias.float() + residual.float()).half())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activation_of_the_first_half_times_the_second(
    device: str, activation: Activation, has_bias: bool
) -> None:
    partial = _partial(4, 3, 1040, device) * 3
    partial[0, 0, :4] = torch.tensor([-200.0, 200.0, 0.0, -90.0])
    bias = torch.randn(1040, device=device) if has_bias else None
    out = torch.full((3, 520), float("nan"), device=device)
    w4a16_reduce(partial, out, bias=bias, residual=None, activation=activation)
    total = partial.double().sum(0) + (0 if bias is None else bias.double())
    gate = total[:, :520]
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    expected = gate * total[:, 520:]
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(device: str) -> None:
    partial = _partial(2, 3, 24, device)
    with pytest.raises(ValueError, match="do not reduce"):
        w4a16_reduce(partial, torch.empty(3, 12, device=device), bias=None, residual=None)
    with pytest.raises(ValueError, match="do not reduce"):
        w4a16_reduce(partial.half(), torch.empty(3, 24, device=device), bias=None, residual=None)
    out = torch.empty(3, 24, device=device)
    with pytest.raises(ValueError, match="residual"):
        w4a16_reduce(partial, out, bias=None, residual=out[:2])
    with pytest.raises(ValueError, match="contiguous"):
        w4a16_reduce(partial, torch.empty(24, 3, device=device).t(), bias=None, residual=None)
