"""The gemm layout: what a word holds, nibble by nibble, and the way back."""

import pytest
import torch

from weft.artifact.packing import dequantize, pack_int4, unpack_int4


def test_nibbles_hold_the_channels_in_autoawq_order():
    packed = pack_int4(torch.arange(8).reshape(1, 8))
    # Channels 0,2,4,6,1,3,5,7 from the lowest nibble up.
    assert packed.tolist() == [[0x75316420]]


def test_a_set_top_bit_wraps_to_a_negative_word():
    row = torch.zeros(1, 8, dtype=torch.int64)
    row[0, 7] = 15
    assert pack_int4(row).tolist() == [[-(1 << 28)]]


@pytest.mark.parametrize("shape", [(1, 8), (63, 104), (100, 64), (0, 8)])
def test_round_trip(shape):
    values = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0))
    packed = pack_int4(values)
    assert packed.dtype == torch.int32
    assert packed.shape == (shape[0], shape[1] // 8)
    assert torch.equal(unpack_int4(packed), values.to(torch.uint8))


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(2, 7, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32),
        torch.zeros(2, 8),
        torch.full((1, 8), 16),
    ],
)
def test_what_cannot_be_packed_is_refused(values):
    with pytest.raises(ValueError, match="pack_int4"):
        pack_int4(values)


def test_unpack_refuses_other_types():
    with pytest.raises(ValueError, match="int32"):
        unpack_int4(torch.zeros(1, 1, dtype=torch.int64))


def test_dequantize_uses_one_scale_and_zero_per_group_of_rows():
    values = torch.randint(0, 16, (64, 16), generator=torch.Generator().manual_seed(1))
    zeros = torch.randint(0, 16, (2, 16), generator=torch.Generator().manual_seed(2))
    scales = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)).half()
    weight = dequantize(pack_int4(values), pack_int4(zeros), scales)
    for row in (0, 31, 32, 63):
        group = row // 32
        assert torch.equal(weight[row], (values[row] - zeros[group]) * scales[group].float())


def test_dequantize_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match="disagree"):
        dequantize(
            pack_int4(torch.zeros(64, 16).int()), pack_int4(torch.zeros(3, 16).int()), torch.ones(3, 16)
        )
