"""RMSNorm kernels against their twins: odd widths, strided rows, poisoned outputs, group sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.kernels import reference
from services.engine.kernels.gpu import norm

EPS = 1e-5


def _inputs(rows: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(hidden)
    x, residual = torch.randn(2, rows, hidden, generator=generator)
    weight = 1 + 0.3 * torch.randn(hidden, generator=generator)
    return tuple(part.to(device, dtype) for part in (3 * x, residual, weight))  # type: ignore[return-value]


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    step = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=step, atol=step / 10)
    if expected.dtype != torch.float32:
        # Where the scale differs in its last bit, few results round the other way; truncation moves half.
        assert int((actual != expected).sum()) <= max(3, expected.numel() // 50)


@pytest.mark.parametrize("hidden", [1, 3, 63, 100, 128, 5120, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_and_sum_are_those_of_the_twin(
    hidden: int, dtype: torch.dtype, device: str, poison_empty: None
) -> None:
    """bfloat16 too: the interpreter's own conversion truncates, so the kernels round there in integers."""
    x, residual, weight = _inputs(3, hidden, dtype, device)
    _assert_close(norm.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    normed, total = norm.add_rms_norm(x, residual, weight, EPS)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, expected_total)
    _assert_close(normed, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_in_fp32_is_multiplied_in_before_the_one_rounding(
    dtype: torch.dtype, device: str, poison_empty: None
) -> None:
    x, residual, weight = _inputs(3, 1000, dtype, device)
    weight = weight.float() + 1e-3
    plain = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    normed = norm.rms_norm(x, weight, EPS)
    _assert_close(normed, reference.rms_norm(x, weight, EPS))
    assert float((normed != plain.to(dtype)).float().mean()) < 0.01
    _assert_close(
        norm.add_rms_norm(x, residual, weight, EPS)[0], reference.add_rms_norm(x, residual, weight, EPS)[0]
    )


@pytest.mark.parametrize("hidden", [64, 320, 384])
@pytest.mark.parametrize("group", [32, 64])
def test_group_sums_are_those_of_the_rounded_result(
    hidden: int, group: int, device: str, poison_empty: None
) -> None:
    x, residual, weight = _inputs(5, hidden, torch.float16, device)
    normed, total, sums = norm.add_rms_norm(x, residual, weight, EPS, group_size=group)
    assert torch.equal(normed, norm.rms_norm(total, weight, EPS))
    expected = normed.double().unflatten(1, (-1, group)).sum(-1)
    assert sums.dtype == torch.float32
    assert sums.shape == expected.shape
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(norm.rms_norm(total, weight, EPS, group_size=group)[1], sums)


def test_rows_need_not_be_adjacent(device: str) -> None:
    wide = torch.randn(4, 3, 100, generator=torch.Generator().manual_seed(1)).to(device)
    weight = torch.ones(100, device=device)
    x, residual = wide[:, 0], wide[:, 2]
    assert torch.equal(norm.rms_norm(x, weight, EPS), norm.rms_norm(x.contiguous(), weight, EPS))
    expected = norm.add_rms_norm(x.contiguous(), residual.contiguous(), weight, EPS)
    for actual, wanted in zip(norm.add_rms_norm(x, residual, weight, EPS), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_row_alone_has_the_bits_it_has_among_others(device: str) -> None:
    x, residual, weight = _inputs(9, 300, torch.float32, device)
    together = norm.add_rms_norm(x, residual, weight, EPS)[0]
    for row in (0, 4, 8):
        alone = norm.add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, EPS)[0]
        assert torch.equal(alone[0], together[row])


def test_one_value_that_is_not_finite_spoils_its_row_only(device: str) -> None:
    x, _, weight = _inputs(3, 64, torch.float32, device)
    x[1, 5] = float("nan")
    y = norm.rms_norm(x, weight, EPS)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())


def test_no_rows_are_no_launch(device: str) -> None:
    x = torch.empty(0, 64, device=device)
    normed, total, sums = norm.add_rms_norm(x, x, torch.ones(64, device=device), EPS, group_size=32)
    assert normed.shape == total.shape == (0, 64)
    assert sums.shape == (0, 2)


@pytest.mark.parametrize(
    ("shape", "weight", "group"),
    [((2, 3, 4), 4, None), ((2, 64), 63, None), ((2, 96), 96, 64), ((2, 96), 96, 48)],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], weight: int, group: int | None, device: str
) -> None:
    with pytest.raises(ValueError, match="must be"):
        norm.rms_norm(
            torch.zeros(shape, device=device), torch.ones(weight, device=device), EPS, group_size=group
        )
