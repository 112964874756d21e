"""The dense linear whose sums run in one order: against fp64, and row alone = row in batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.kernels.gpu import dense_linear as module
from services.engine.kernels.gpu.dense_linear import GpuDenseLinear, dense_linear
from services.engine.kernels.numerics import Numerics

HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "num_splits"),
    [(1, 64, 8, 1), (33, 100, 136, 2), (3, 7, 1, 1), (17, 129, 200, 3)],
)
def test_product(
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    out_features: int,
    num_splits: int,
) -> None:
    monkeypatch.setattr(module, "choose_fixed_splits", lambda *_: num_splits)
    buffer = torch.full((rows + 1, in_features + 8), float("nan"), dtype=dtype, device=device)
    buffer[:rows, :in_features] = _randn(rows, in_features).to(dtype)
    x = buffer[:rows, :in_features]
    weight = _randn(out_features, in_features, seed=1).to(device, dtype)
    bias = _randn(out_features, seed=2).to(device, dtype)
    residual = _randn(rows, out_features, seed=3).to(device, dtype)
    y = dense_linear(x, weight, bias, residual)
    expected = x.double() @ weight.double().t()
    for found, wanted in [
        (dense_linear(x, weight), expected),
        (y, expected + bias.double() + residual.double()),
    ]:
        assert found.dtype == dtype
        assert float((found.double() - wanted).abs().amax() / wanted.abs().amax()) < TOLERANCE[dtype]


def test_a_row_alone_has_the_bits_it_has_among_others(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "choose_fixed_splits", lambda *_: 2)
    x, weight = _randn(70, 100).to(device, torch.float16), _randn(24, 100, seed=1).to(device, torch.float16)
    together = dense_linear(x, weight)
    assert torch.equal(dense_linear(x.flip(0), weight).flip(0), together)
    for rows in (1, 2, 16, 31, 32, 33, 65):
        assert torch.equal(dense_linear(x[:rows], weight), together[:rows])
    assert torch.equal(dense_linear(x[69:], weight), together[69:])
    monkeypatch.setattr(module, "rows_per_launch", lambda *_: 32)
    assert torch.equal(dense_linear(x, weight), together)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_linear(device: str, is_deterministic: bool) -> None:
    dtype = DTYPES[0]
    weight, bias = _randn(24, 72), _randn(24, seed=1)
    linear = GpuDenseLinear(weight.to(device), bias.to(device), Numerics(dtype, is_deterministic))
    assert linear.path == ("dense-fixed" if is_deterministic else "dense")
    assert (linear.in_features, linear.out_features) == (72, 24)
    assert linear.num_bytes == (24 * 72 + 24) * dtype.itemsize
    x, residual = _randn(5, 72, seed=2), _randn(5, 24, seed=3)
    expected = x.double() @ weight.double().t() + bias.double()
    y = linear(x.to(device)).cpu()
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4)
    y = linear(x.to(device), residual.to(device)).cpu()
    assert torch.allclose(y.double(), expected + residual.double(), rtol=1e-4, atol=1e-4)
    plain = GpuDenseLinear(weight.to(device), None, Numerics(dtype, is_deterministic))
    y = plain(x.to(device), residual.to(device)).cpu() - residual
    assert torch.allclose(y.double(), expected - bias.double(), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(device: str) -> None:
    x, weight = torch.zeros(3, 8, device=device), torch.zeros(5, 8, device=device)
    with pytest.raises(ValueError, match="does not fit weight"):
        dense_linear(x, weight[:, :4].contiguous())
    with pytest.raises(ValueError, match="does not fit weight"):
        dense_linear(x.half(), weight)
    with pytest.raises(ValueError, match="bias"):
        dense_linear(x, weight, bias=x.new_zeros(4))
    with pytest.raises(ValueError, match="residual"):
        dense_linear(x, weight, residual=x.new_zeros(5, 3))
