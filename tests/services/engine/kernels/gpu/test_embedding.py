"""Row gathers against index_select, every bit: odd widths, strides, wide rows, NaN in the table."""

from __future__ import annotations

import pytest
import torch

from services.engine.kernels.gpu.embedding import embedding, gather_rows


@pytest.mark.parametrize("width", [1, 3, 100, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_copied_bit_for_bit(width: int, dtype: torch.dtype, device: str, poison_empty: None) -> None:
    table = torch.randn(7, width, generator=torch.Generator().manual_seed(width)).to(device, dtype)
    ids = torch.tensor([6, 0, 3, 3], device=device)
    assert torch.equal(embedding(ids, table), table.index_select(0, ids))
    assert torch.equal(gather_rows(table, ids.int()), table.index_select(0, ids))


def test_rows_need_not_be_adjacent_and_carry_their_nan(device: str) -> None:
    x = torch.randn(5, 2, 33, generator=torch.Generator().manual_seed(0)).to(device)
    x[2, 1, 7] = float("nan")
    rows = torch.tensor([2, 4], device=device)
    assert torch.equal(gather_rows(x[:, 1], rows).isnan(), x[rows, 1].isnan())
    assert torch.equal(gather_rows(x[:, 1], rows)[1], x[4, 1])


def test_addresses_are_wider_than_32_bits(device: str) -> None:
    """Row 2^18 of rows 2^14 apart begins beyond 2^32 values. The memory between is never touched."""
    base = torch.empty((1 << 32) + 64, dtype=torch.uint8, device=device)
    table = base.as_strided(((1 << 18) + 1, 64), (1 << 14, 1))
    table[-1] = torch.arange(64, device=device)
    rows = torch.tensor([1 << 18], dtype=torch.int32, device=device)
    assert gather_rows(table, rows)[0].tolist() == list(range(64))


def test_no_rows_are_no_launch(device: str) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert gather_rows(torch.zeros(3, 5, device=device), none).shape == (0, 5)


def test_what_does_not_fit_is_refused(device: str) -> None:
    table = torch.zeros(3, 5, device=device)
    with pytest.raises(ValueError, match="rows must be"):
        gather_rows(table, torch.zeros(2, device=device))
    with pytest.raises(ValueError, match="x must be"):
        gather_rows(table.T, torch.zeros(2, dtype=torch.int64, device=device))
