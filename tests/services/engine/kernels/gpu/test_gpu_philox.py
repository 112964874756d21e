"""The words of the device are those of the CPU's generator, and its noise is close to exact noise."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.philox import gumbel, words_of_groups
from services.engine.kernels.gpu.rounding import is_interpreting
from services.engine.runner import philox as cpu

_SEEDS = [(0, 0, 0), (1, 2, 3), (0xFFFFFFFFFFFFFFFF, 0x7FFFFFFF, 131071), (0x8000000012345678, 5, 1 << 20)]


@triton.jit
def _words_kernel(out_ptr, params_ptr, first, GROUPS: tl.constexpr):
    low = tl.load(params_ptr).to(tl.uint32, bitcast=True)
    high = tl.load(params_ptr + 1).to(tl.uint32, bitcast=True)
    index = tl.load(params_ptr + 2).to(tl.uint32, bitcast=True)
    offset = tl.load(params_ptr + 3).to(tl.uint32, bitcast=True)
    words = words_of_groups(first + tl.arange(0, GROUPS), low, high, index, offset)
    tl.store(out_ptr + tl.arange(0, 4 * GROUPS), words.to(tl.int32, bitcast=True))


@triton.jit
def _gumbel_kernel(words_ptr, out_ptr, size, INTERPRET: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + at, mask=at < size, other=0).to(tl.uint32, bitcast=True)
    tl.store(out_ptr + at, gumbel(words, INTERPRET), mask=at < size)


def _signed(values: Tensor) -> Tensor:
    """int32 with the bits of 32-bit values held in int64."""
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32)


@pytest.mark.parametrize(("seed", "index", "offset"), _SEEDS)
@pytest.mark.parametrize(("first", "groups"), [(0, 1), (5, 64), (32000, 16)])
def test_words_are_those_of_the_cpu(
    seed: int, index: int, offset: int, first: int, groups: int, device: str
) -> None:
    params = _signed(torch.tensor([seed & 0xFFFFFFFF, seed >> 32, index, offset])).to(device)
    out = torch.zeros(4 * groups, dtype=torch.int32, device=device)
    _words_kernel[(1,)](out, params, first, GROUPS=groups)
    ids = torch.arange(4 * first, 4 * (first + groups))[None]
    expected = cpu.DrawKeys([seed], [index], [offset]).words_of(ids)[0]
    assert torch.equal(out.cpu(), _signed(expected))


def test_noise_is_close_to_exact_for_all_kinds_of_words(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    powers = 1 << torch.arange(32)
    near_powers = torch.cat([powers + step for step in range(-3, 4)])
    near_seams = torch.cat([torch.arange(seam - 999, seam + 999) for seam in (1 << 31, 15 << 28)])
    edges = torch.cat((torch.arange(2000), near_powers, near_seams))
    edges = torch.cat((edges, (1 << 32) - 1 - edges)).clamp(0, (1 << 32) - 1)
    words = torch.cat((edges, torch.randint(0, 1 << 32, (1_000_000,), generator=generator)))
    block = 1 << 16
    out = torch.full((len(words),), float("nan"), device=device)
    _gumbel_kernel[(triton.cdiv(len(words), block),)](
        _signed(words).to(device), out, len(words), INTERPRET=is_interpreting(), BLOCK=block
    )
    error = (out.cpu().double() - cpu.gumbel(words)).abs()
    assert float(error.max()) < 1e-5, words[error.argmax()]
