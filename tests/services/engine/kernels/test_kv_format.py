"""Quantised vectors of K and V: the error of a value against the step of its codes, and what has no step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.kernels.kv_format import (
    FORMATS,
    MIN_SCALE,
    _scale,
    dequantize,
    pack_params,
    quantize,
    unpack_params,
)

QUANTIZED = ["int8", "int4", "fp8"]
LARGEST = 2.0**125
"""Ranges are differences: twice the largest value must still be a float."""
values = st.floats(-LARGEST, LARGEST, width=32) | st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0])
vectors = st.lists(values, min_size=1, max_size=9).map(lambda half: torch.tensor(half + half[::-1]))


def _round_trip(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values that come back, scale, minimum)."""
    codes, params = quantize(x, FORMATS[name])
    assert codes.dtype == torch.uint8
    assert codes.shape == (*x.shape[:-1], FORMATS[name].row_size(x.shape[-1]))
    assert params.shape == x.shape[:-1]
    return dequantize(codes, params, FORMATS[name]), *unpack_params(params)


@settings(max_examples=150, deadline=None)
@given(vectors, st.sampled_from(["int8", "int4"]))
def test_integer_codes_are_within_half_a_step(x: Tensor, name: str) -> None:
    found, scale, minimum = _round_trip(x, name)
    wide, step = x.double(), float(scale)
    largest = float(wide.abs().max())
    # Half a step, and the rounding of s * u + m in fp32, which is of the size of the largest number in it.
    allowed = step / 2 * (1 + 2.0**-14) + 2.0**-22 * max(largest, abs(float(minimum)))
    assert float((found.double() - wide).abs().max()) <= allowed
    extent = float(wide.max() - wide.min())
    # The minimum is a bfloat16 below the smallest value, at most 2^-7 of it away; the scale is rounded up.
    bound = (extent + largest * 2.0**-7) / FORMATS[name].max_code * (1 + 2.0**-7)
    assert step <= max(bound, MIN_SCALE) * (1 + 1e-6)
    assert float(minimum) <= float(wide.min())


@settings(max_examples=100, deadline=None)
@given(vectors)
def test_float_codes_are_within_half_a_unit_of_their_own(x: Tensor) -> None:
    found, scale, minimum = _round_trip(x, "fp8")
    assert float(minimum) == 0
    wide, step = x.double(), float(scale)
    # Four significant bits of a normal code; subnormal codes are 2^-9 of the scale apart.
    allowed = (wide.abs() * 2.0**-4).clamp_min(2.0**-10 * step) * (1 + 2.0**-14) + 2.0**-149
    assert bool(((found.double() - wide).abs() <= allowed).all())
    assert step <= max(float(wide.abs().max()) / 448 * (1 + 2.0**-7), MIN_SCALE)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 2.0**-120, 2.0**100, -(2.0**100)])
def test_equal_values_that_are_bfloat16_come_back(name: str, value: float) -> None:
    codes, params = quantize(torch.full((2, 6), value), FORMATS[name])
    assert not bool(codes.any())
    assert torch.equal(dequantize(codes, params, FORMATS[name]), torch.full((2, 6), value))


@pytest.mark.parametrize("value", [0.0, 2.0**-140])
def test_float_codes_of_next_to_nothing_are_zeros(value: float) -> None:
    found, scale, _ = _round_trip(torch.full((2, 6), value), "fp8")
    assert not bool(found.any())
    assert torch.equal(scale, torch.full((2,), MIN_SCALE))


@pytest.mark.parametrize("name", QUANTIZED)
def test_vectors_do_not_touch_each_other(name: str) -> None:
    x = torch.randn(5, 3, 10) * torch.tensor([1e-30, 1e-3, 1.0, 1e3, 1e30])[:, None, None]
    together = quantize(x, FORMATS[name])
    for row in range(5):
        for head in range(3):
            alone = quantize(x[row, head], FORMATS[name])
            assert torch.equal(together[0][row, head], alone[0])
            assert torch.equal(together[1][row, head], alone[1])


def test_an_offset_costs_no_code() -> None:
    x = torch.linspace(0, 1, 64)
    steps = [float(_round_trip(x + offset, "int8")[1]) for offset in (0.0, 16.0, -16.0)]
    assert steps[0] <= 1.01 / 255
    assert max(steps) <= 1.2 / 255


def test_int4_has_the_even_element_in_the_low_nibble() -> None:
    codes, params = quantize(torch.tensor([0.0, 15.0, 3.0, 4.0]), FORMATS["int4"])
    assert codes.tolist() == [0xF0, 0x43]
    assert [float(part) for part in unpack_params(params)] == [1.0, 0.0]


def test_every_float8_number_is_read_as_torch_reads_it() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    params = pack_params(torch.tensor(1.0), torch.tensor(0.0))
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(dequantize(codes, params, FORMATS["fp8"]), expected)


def test_every_pair_of_nibbles_is_read_in_order() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    found = dequantize(codes, pack_params(torch.tensor(1.0), torch.tensor(0.0)), FORMATS["int4"])
    assert found.tolist() == [float(part) for code in range(256) for part in (code & 15, code >> 4)]


NOT_FINITE = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38]
NVIDIA_NAN = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("at", [0, 3, 7])
def test_what_is_not_finite_makes_its_vector_nan_and_no_other(name: str, at: int) -> None:
    bad = torch.cat([torch.tensor(NOT_FINITE), NVIDIA_NAN])
    x = torch.randn(len(bad), 8)
    x[:, at] = bad
    if name == "fp8":
        # A symmetric range has room for these: only the largest scale's last step is out of reach.
        x[3:5, at] = math.inf
    else:
        x[3:5, (at + 1) % 8] = -x[3:5, at]  # a range of 6.8e38
    beside = torch.arange(8.0)
    found, scale, _ = _round_trip(torch.cat([x, beside[None]]), name)
    assert bool(found[:-1].isnan().all())
    assert bool(scale[:-1].isnan().all())
    assert torch.equal(found[-1], _round_trip(beside, name)[0])


def test_a_nan_of_all_ones_is_not_rounded_to_a_number() -> None:
    """The NaN that NVIDIA's arithmetic makes; reductions on a CPU make another one."""
    extents = torch.cat([NVIDIA_NAN, torch.tensor([math.nan, math.inf, 3.4e38 * 255, 510.0])])
    assert _scale(extents, 255)[:-1].isnan().all()
    assert float(_scale(extents, 255)[-1]) == 2


@pytest.mark.parametrize(("name", "expected"), [("float32", 400), ("bfloat16", 200), ("float16", 200)])
def test_bytes_of_a_full_precision_vector(name: str, expected: int) -> None:
    assert FORMATS[name].bytes_per_vector(100) == expected


@pytest.mark.parametrize(("name", "expected"), [("int8", 104), ("fp8", 104), ("int4", 54)])
def test_bytes_of_a_quantised_vector_count_scale_and_minimum(name: str, expected: int) -> None:
    assert FORMATS[name].bytes_per_vector(100) == expected


def test_an_odd_head_has_no_whole_row_of_nibbles() -> None:
    with pytest.raises(ValueError, match="int4 needs an even head_dim, found 63"):
        FORMATS["int4"].row_size(63)


def test_params_are_two_bfloat16_numbers() -> None:
    scale, minimum = torch.tensor([1.5, 2.0**-100]), torch.tensor([-0.75, -(2.0**120)])
    params = pack_params(scale, minimum)
    halves = params.view(torch.bfloat16).view(2, 2).float()
    assert torch.equal(halves, torch.stack([scale, minimum], 1))
    assert all(torch.equal(a, b) for a, b in zip(unpack_params(params), (scale, minimum), strict=True))
