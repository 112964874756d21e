"""The 4-bit linear of the GPU: which path runs, what it holds, and results on every path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels import reference
from services.engine.kernels.gpu import launch_configs, w4a16_linear
from services.engine.kernels.gpu.w4a16_linear import GpuInt4Linear
from services.engine.kernels.numerics import Numerics

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
TOLERANCE = 1e-2 if torch.cuda.is_available() else 1e-5


def _weight(in_features: int, out_features: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(in_features + out_features)
    groups = in_features // group
    values = torch.randint(16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (groups, out_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, out_features, generator=generator) * 0.02 + 1e-3).half()
    return values, zeros, scales


def _make(
    weight: tuple[Tensor, Tensor, Tensor],
    device: str,
    *,
    bias: Tensor | None = None,
    is_deterministic: bool = False,
    is_gate_up: bool = False,
) -> GpuInt4Linear:
    numerics = Numerics(DTYPE, is_deterministic)
    bias = None if bias is None else bias.to(device)
    return GpuInt4Linear(*(part.to(device) for part in weight), bias, numerics, is_gate_up=is_gate_up)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).abs().amax() / expected.abs().amax())


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "group"),
    [(1, 256, 136, 128), (17, 192, 24, 64), (100, 96, 8, 32), (3, 72, 40, 24), (257, 128, 24, 128)],
)
def test_every_path_gives_the_twins_product(
    device: str, rows: int, in_features: int, out_features: int, group: int, is_deterministic: bool
) -> None:
    weight, bias = _weight(in_features, out_features, group), _randn(out_features, seed=1)
    x, residual = _randn(rows, in_features).to(DTYPE), _randn(rows, out_features, seed=2).to(DTYPE)
    linear = _make(weight, device, bias=bias, is_deterministic=is_deterministic)
    plain = x.double() @ reference.dequantize_int4(*weight).double() + bias.to(DTYPE).double()
    y = linear(x.to(device))
    assert y.shape == (rows, out_features)
    assert y.dtype == DTYPE
    assert _error(y, plain) < TOLERANCE
    assert _error(linear(x.to(device), residual.to(device)), plain + residual.double()) < TOLERANCE


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("is_gate_up", [False, True])
@pytest.mark.parametrize(("rows", "group"), [(5, 128), (300, 128), (5, 8)])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activation_mul(
    device: str, activation: str, rows: int, group: int, is_gate_up: bool, is_deterministic: bool
) -> None:
    weight = _weight(128, 48, group)
    linear = _make(weight, device, is_gate_up=is_gate_up, is_deterministic=is_deterministic)
    x = _randn(rows, 128).to(DTYPE)
    plain = x.double() @ reference.dequantize_int4(*weight).double()
    gate = plain[:, :24]
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    gated = linear.silu_mul if activation == "silu" else linear.gelu_mul
    assert _error(gated(x.to(device)), gate * plain[:, 24:]) < TOLERANCE
    assert _error(linear(x.to(device)), plain) < TOLERANCE


def test_many_rows_take_the_dequantised_weight(device: str) -> None:
    weight = _weight(128, 24, 128)
    linear = _make(weight, device)
    x = _randn(launch_configs.MAX_FUSED_ROWS + 1, 128).to(device, DTYPE)
    dense = reference.dequantize_int4(*weight).t().to(device, DTYPE).contiguous()
    assert torch.equal(linear(x), F.linear(x, dense))


def test_path_says_what_runs(device: str) -> None:
    good, odd = _weight(128, 24, 128), _weight(72, 24, 24)
    assert _make(good, device).path == "w4a16"
    assert _make(good, device, is_deterministic=True).path == "w4a16-fixed"
    assert _make(odd, device).path == "w4a16-dequantize"
    assert _make(odd, device, is_deterministic=True).path == "w4a16-dequantize-fixed"


def test_one_copy_of_the_weight_is_held(device: str) -> None:
    linear = _make(_weight(512, 256, 128), device, bias=_randn(256))
    held = [linear.packed.words, linear.packed.params, linear.bias]
    assert linear.num_bytes == sum(tensor.nbytes for tensor in held)
    assert linear.num_bytes <= 0.54 * 512 * 256 + linear.bias.nbytes
    assert (linear.in_features, linear.out_features) == (512, 256)


@pytest.mark.parametrize("is_gate_up", [False, True])
def test_fixed_path_does_not_depend_on_where_a_batch_is_cut(
    device: str, monkeypatch: pytest.MonkeyPatch, is_gate_up: bool
) -> None:
    """Partial sums are bounded: many rows take several launches, with the same bits."""
    linear = _make(_weight(256, 48, 128), device, is_deterministic=True, is_gate_up=is_gate_up)
    monkeypatch.setattr(w4a16_linear, "choose_fixed_splits", lambda *_: 2)
    x, residual = (_randn(70, n, seed=n).to(device, DTYPE) for n in (256, 48))
    whole, gated = linear(x, residual), linear.silu_mul(x)
    monkeypatch.setattr(launch_configs, "_MAX_PARTIAL_BYTES", 1)
    assert torch.equal(linear(x, residual), whole)
    assert torch.equal(linear.silu_mul(x), gated)
    for row in (0, 33, 69):
        alone = slice(row, row + 1)
        assert torch.equal(linear(x[alone], residual[alone]), whole[alone])


def test_rows_of_a_transposed_tensor(device: str) -> None:
    linear = _make(_weight(128, 24, 128), device)
    x = _randn(128, 3).to(device, DTYPE).t()
    assert torch.equal(linear(x), linear(x.contiguous()))
