"""silu(gate) * up and gelu(gate) * up against their twins, with odd widths, strides and gates at the ends of
the range.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from services.engine.kernels import reference
from services.engine.kernels.gpu.silu_mul import gelu_mul, silu_mul

BOTH = pytest.mark.parametrize("op", [silu_mul, gelu_mul])


@BOTH
@pytest.mark.parametrize("width", [1, 3, 63, 100, 1025])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_it_is_that_of_the_twin(
    op: Callable[[torch.Tensor], torch.Tensor],
    width: int,
    dtype: torch.dtype,
    device: str,
    poison_empty: None,
) -> None:
    generator = torch.Generator().manual_seed(width)
    gate_up = (4 * torch.randn(3, 2 * width, generator=generator)).to(device, dtype)
    expected = getattr(reference, op.__name__)(gate_up)
    step = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(op(gate_up), expected, rtol=step, atol=1e-7)


@BOTH
def test_gates_at_the_ends_of_the_range(op: Callable[[torch.Tensor], torch.Tensor], device: str) -> None:
    infinity = float("inf")
    gate = torch.tensor([[-200.0, -88.5, -0.0, 200.0, infinity, float("nan")]], device=device)
    y = op(torch.cat((gate, torch.full_like(gate, 3.0)), 1))[0].tolist()
    assert [y[0], y[2], y[3], y[4]] == [0.0, 0.0, 600.0, infinity]
    assert -1e-35 < y[1] <= 0.0
    assert y[5] != y[5]


@BOTH
def test_rows_need_not_be_adjacent_and_have_the_bits_they_have_alone(
    op: Callable[[torch.Tensor], torch.Tensor], device: str
) -> None:
    wide = torch.randn(5, 3, 2 * 77, generator=torch.Generator().manual_seed(2)).to(device)
    x = wide[:, 1]
    together = op(x)
    assert torch.equal(together, op(x.contiguous()))
    for row in range(5):
        assert torch.equal(op(x[row : row + 1])[0], together[row])


def test_no_rows_are_no_launch(device: str) -> None:
    assert silu_mul(torch.empty(0, 8, device=device)).shape == (0, 4)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 0)])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], device: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        silu_mul(torch.zeros(shape, device=device))
