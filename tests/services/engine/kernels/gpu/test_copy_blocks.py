"""Block copies against slices: every format's units, few and many slots, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.kernels.gpu.copy_blocks import copy_blocks

COPIES = [(0, 3, 5), (4, 1, 1), (4, 2, 16), (5, 6, 0)]


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 250, shape, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tail"),
    [
        (torch.float32, (20,)),
        (torch.float16, (5,)),
        (torch.bfloat16, (300,)),
        (torch.uint8, (7,)),
        (torch.uint8, (32,)),
        (torch.int32, ()),
    ],
)
def test_leading_slots_of_every_layer_and_head(
    dtype: torch.dtype, tail: tuple[int, ...], device: str
) -> None:
    stored = _random((2, 2, 7, 3, 16, *tail), dtype)
    if dtype.is_floating_point:
        stored[:, :, 4, 1, 7] = float("nan")
    expected = stored.clone()
    for source, destination, count in COPIES:
        expected[:, :, destination, :, :count] = expected[:, :, source, :, :count]
    actual = stored.to(device)
    copy_blocks(actual, torch.tensor(COPIES, dtype=torch.int32, device=device))
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(actual.cpu().view(kind), expected.view(kind))


def test_addresses_are_wider_than_32_bits(device: str) -> None:
    """The last block begins beyond 2^32 units: slots of odd size are copied by the byte. The memory between
    is never touched.
    """
    blocks = (1 << 32) // (16 * 255) + 2
    stored = torch.empty(1, 1, blocks, 1, 16, 255, dtype=torch.uint8, device=device)
    stored[:, :, 1] = _random((1, 1, 1, 16, 255), torch.uint8).to(device)
    stored[:, :, 2] = 1
    copies = [[1, blocks - 1, 16], [blocks - 1, 2, 16]]
    for copy in copies:
        copy_blocks(stored, torch.tensor([copy], dtype=torch.int32, device=device))
    assert torch.equal(stored[:, :, -1], stored[:, :, 1])
    assert torch.equal(stored[:, :, 2], stored[:, :, 1])


def test_no_copies_are_no_launch(device: str) -> None:
    stored = torch.zeros(1, 2, 3, 1, 16, 8, device=device)
    copy_blocks(stored, torch.empty(0, 3, dtype=torch.int32, device=device))
    assert not bool(stored.any())


def test_what_does_not_fit_is_refused(device: str) -> None:
    stored = torch.zeros(1, 2, 3, 2, 16, 8, device=device)
    copies = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        copy_blocks(stored.transpose(3, 4), copies)
    with pytest.raises(ValueError, match="copies"):
        copy_blocks(stored, copies.long())
