"""What a word holds, nibble by nibble, and the way back: the gemm layout and the sequential ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.artifact.packing import (
    ORDER,
    SEQUENTIAL,
    dequantize,
    pack_int4,
    pack_rows,
    unpack_int4,
    unpack_rows,
)


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


def read_words(packed, order):
    """A few lines of numpy, from the description alone: [rows, words] -> [rows, 8 * words]."""
    words = packed.numpy().view(np.uint32)
    out = np.zeros((words.shape[0], 8 * words.shape[1]), np.uint8)
    for column in range(out.shape[1]):
        out[:, column] = words[:, column // 8] >> np.uint32(4 * order.index(column % 8)) & 15
    return out


@given(
    rows=st.integers(1, 40), words=st.integers(1, 9), seed=st.integers(0, 1 << 30),
    order=st.sampled_from([ORDER, SEQUENTIAL]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_order_is_what_a_reader_of_its_own_finds(rows, words, seed, order):
    values = torch.randint(0, 16, (rows, 8 * words), generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(values, order)
    assert np.array_equal(read_words(packed, order), values.numpy())
    assert torch.equal(unpack_int4(packed, order), values.to(torch.uint8))


@given(words=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_rows_are_packed_along_the_first_dimension(words, columns, seed):
    values = torch.randint(0, 16, (8 * words, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_rows(values)
    assert packed.shape == (words, columns)
    assert packed.is_contiguous()
    assert np.array_equal(read_words(packed.T.contiguous(), SEQUENTIAL).T, values.numpy())
    assert torch.equal(unpack_rows(packed), values.to(torch.uint8))


@given(rows=st.integers(1, 5), groups=st.integers(1, 40), seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None)
def test_compressed_tensors_packs_the_same_words(rows, groups, seed):
    """It calls the numbers signed: eight less."""
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = torch.randint(0, 16, (8 * rows, 8 * groups), generator=torch.Generator().manual_seed(seed))
    signed = (values - 8).to(torch.int8)
    assert torch.equal(package.pack_to_int32(signed, 4), pack_int4(values, SEQUENTIAL))
    assert torch.equal(package.pack_to_int32(signed, 4, packed_dim=0), pack_rows(values))
    assert torch.equal(package.unpack_from_int32(pack_rows(values), 4, values.shape, packed_dim=0), signed)
