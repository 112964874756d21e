"""The packed order of a 4-bit weight: nothing lost, and every nibble where the kernels look for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.kernels.gpu.w4a16_repack import pack, unpack


def _weight(in_features: int, out_features: int, group: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group
    values = torch.randint(16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (groups, out_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, out_features, generator=generator) + 1e-3).half()
    return values, zeros, scales


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    group=st.sampled_from([2, 16, 24, 32, 48, 64, 96, 128, 256]),
    num_groups=st.integers(1, 5),
    eighths=st.integers(1, 40),
    is_interleaved=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_unpack_gives_back_what_was_packed(
    group: int, num_groups: int, eighths: int, is_interleaved: bool, dtype: torch.dtype, seed: int
) -> None:
    given_weight = _weight(group * num_groups, 8 * eighths, group, seed)
    packed = pack(*given_weight, dtype, is_interleaved=is_interleaved)
    for found, wanted in zip(unpack(packed), given_weight, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_each_nibble_lies_where_the_module_says() -> None:
    values, zeros, scales = _weight(192, 200, 64, 0)
    words = pack(values, zeros, scales, torch.bfloat16).words
    assert words.shape == (2, 4, 1024)
    for k, n in [
        (0, 0),
        (1, 0),
        (2, 0),
        (8, 8),
        (16, 1),
        (63, 63),
        (64, 64),
        (191, 199),
        (77, 130),
        (150, 5),
    ]:
        tile, block = n // 128, k // 64
        bit = [(n >> i) & 1 for i in range(7)]
        low = [(k >> i) & 1 for i in range(6)]
        order = (low[3], bit[3], low[1], low[2], bit[0], bit[1], bit[2], bit[4], bit[5], bit[6])
        # The register's two bits: k3 above n3.
        order = (order[1], order[0], *order[2:])
        word = int(words[tile, block, sum(b << i for i, b in enumerate(order))])
        shift = 4 * ((k >> 4) & 3) + 16 * (k & 1)
        assert (word >> shift) & 15 == int(values[k, n])


@pytest.mark.parametrize(
    ("dtype", "magic", "view"),
    [(torch.bfloat16, 128, torch.bfloat16), (torch.float16, 1024, torch.float16)],
)
def test_params_are_the_negative_magic_zero_and_the_scale(
    dtype: torch.dtype, magic: int, view: torch.dtype
) -> None:
    values, zeros, scales = _weight(256, 8, 128, 1)
    params = pack(values, zeros, scales, dtype).params
    assert params.shape == (1, 2, 128, 1)
    low = (params[0, :, :8, 0] & 0xFFFF).to(torch.int16).view(view)
    assert torch.equal(low.float(), -(magic + zeros.float()))
    assert torch.equal((params[0, :, :8, 0] >> 16).to(torch.int16).view(torch.float16), scales)
    assert int(params[0, :, 8:].abs().max()) == 0


def test_gate_and_up_lie_eight_rows_apart() -> None:
    values, zeros, scales = _weight(128, 48, 128, 2)
    apart = pack(values, zeros, scales, torch.bfloat16, is_interleaved=True)
    rows = [8 * (i // 8) * 2 + i % 8 for i in range(24)]
    plain = torch.zeros(128, 128, dtype=torch.uint8)
    plain[:, rows], plain[:, [row + 8 for row in rows]] = values[:, :24], values[:, 24:]
    same = pack(plain, torch.zeros(1, 128, dtype=torch.uint8), torch.ones(1, 128), torch.bfloat16)
    assert torch.equal(apart.words, same.words)


def test_half_a_byte_a_weight_and_four_bytes_a_group() -> None:
    packed = pack(*_weight(512, 256, 128, 3), torch.bfloat16)
    assert packed.num_bytes == 512 * 256 // 2 + 4 * 256 * 4
    short = pack(*_weight(512, 256, 32, 3), torch.bfloat16)
    assert short.num_bytes == 512 * 256 // 2 + 16 * 256 * 4


def test_what_does_not_fit_is_refused() -> None:
    values, zeros, scales = _weight(64, 8, 32, 4)
    with pytest.raises(ValueError, match="equal groups"):
        pack(values, zeros, scales[:1], torch.bfloat16)
    with pytest.raises(ValueError, match="equal groups"):
        pack(values[:63], zeros, scales, torch.bfloat16)
    with pytest.raises(ValueError, match="8 outputs"):
        pack(values, zeros[:, :4], scales[:, :4], torch.bfloat16)
    for bad in (1e6, 1e-12, float("nan")):
        with pytest.raises(ValueError, match="fp16"):
            pack(values, zeros, scales.float().fill_(bad), torch.bfloat16)
