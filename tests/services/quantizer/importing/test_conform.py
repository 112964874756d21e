"""What an artifact can hold of a stored linear: exactly where it can, counted and rounded where it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.quantizer.errors import QuantizerError
from services.quantizer.importing.conform import Rounded, conform, largest_group_size
from services.quantizer.importing.layouts import StoredWeight


def stored(num_out=16, num_in=256, groups=4, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "values": torch.randint(0, 16, (num_out, num_in), generator=generator).to(torch.uint8),
        "zeros": torch.randint(0, 16, (num_out, groups), generator=generator).to(torch.int16),
        "scales": (torch.rand(num_out, groups, generator=generator) + 0.01).half(),
    }
    return StoredWeight(**{**parts, **changes})


def meaning(weight):
    """fp64 [out, in], input by input."""
    num_in, groups = weight.values.shape[1], weight.zeros.shape[1]
    index = weight.group_index
    index = [i * groups // num_in for i in range(num_in)] if index is None else index.tolist()
    columns = [
        (weight.values[:, i].double() - weight.zeros[:, g].double()) * weight.scales[:, g].double()
        for i, g in enumerate(index)
    ]
    return torch.stack(columns, 1)


def conformed(weight, group_size=32, name="x.scales"):
    rounded = Rounded()
    return conform(weight, name, group_size, rounded), rounded.groups


def test_groups_are_cut_into_smaller_ones():
    weight = stored()
    found, rounded = conformed(weight)
    assert not rounded
    assert found.zeros.shape == (16, 8)
    assert torch.equal(found.dequantize().double(), meaning(weight))


@given(seed=st.integers(0, 1 << 20), size=st.sampled_from([32, 64, 128]))
@settings(max_examples=15, deadline=None)
def test_whole_runs_of_any_group_order_are_exact(seed, size):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 4, (256 // size,), generator=generator).repeat_interleave(size)
    weight = stored(seed=seed, group_index=index)
    assert largest_group_size(256, 4, index) >= size
    found, rounded = conformed(weight, size)
    assert not rounded
    assert torch.equal(found.dequantize().double(), meaning(weight))


def test_act_order_has_no_run_and_is_rounded():
    index = torch.randperm(256, generator=torch.Generator().manual_seed(1)) // 64
    weight = stored(group_index=index)
    assert largest_group_size(256, 4, index) is None
    found, rounded = conformed(weight)
    assert rounded == {"inputs in another order (act-order)": 16 * 8}
    error = (found.dequantize().double() - meaning(weight)).abs()
    assert bool((error <= found.scales.double().repeat_interleave(32, 1) * 0.51).all())


@pytest.mark.parametrize(
    ("num_in", "groups", "size"),
    [(256, 1, 128), (192, 1, 64), (96, 1, 32), (256, 4, 64), (2048, 2, 128), (80, 1, None), (64, 4, None)],
)
def test_the_largest_group_size_that_fits(num_in, groups, size):
    assert largest_group_size(num_in, groups, None) == size


def test_a_zero_point_of_16_is_exact_while_no_value_is_0():
    values = torch.randint(1, 16, (16, 256), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    weight = stored(values=values, zeros=torch.full((16, 4), 16).short())
    found, rounded = conformed(weight, 64)
    assert not rounded
    assert torch.equal(found.dequantize().double(), meaning(weight))


def test_a_zero_point_of_16_with_a_value_of_0_is_counted_and_rounded():
    weight = stored(values=torch.full((16, 256), 7, dtype=torch.uint8), zeros=torch.full((16, 4), 16).short())
    weight.values[3, 70] = 0
    weight.values[5, 10] = 0
    found, rounded = conformed(weight, 64)
    assert rounded == {"a zero point of 16": 2}
    expected = meaning(weight)
    is_same = (found.dequantize().double() == expected).unflatten(1, (4, 64)).all(-1)
    is_same[3, 1] = is_same[5, 0] = True
    assert bool(is_same.all())
    torch.testing.assert_close(found.dequantize().double()[3, 64:128], expected[3, 64:128], atol=0.6, rtol=0)


def test_wider_scales_are_taken_while_fp16_holds_them():
    weight = stored()
    for dtype in (torch.float32, torch.float64):
        found, rounded = conformed(stored(scales=weight.scales.to(dtype).float()))
        assert not rounded
        assert torch.equal(found.scales, conformed(weight)[0].scales)
    short = weight.scales.bfloat16()
    found, rounded = conformed(stored(scales=short))
    assert not rounded
    assert torch.equal(found.scales.float(), short.float().repeat_interleave(2, 1))


def test_scales_that_fp16_rounds_are_counted_and_keep_their_integers():
    scales = stored().scales.float()
    scales[2, 1] *= 1.0001
    weight = stored(scales=scales)
    found, rounded = conformed(weight, 64)
    assert rounded == {"a scale that is no fp16 number": 1}
    assert torch.equal(found.values, weight.values)


def test_subnormal_scales_are_lifted_where_the_group_is_empty_and_rounded_elsewhere():
    weight = stored()
    weight.scales[4, 0], weight.scales[6, 2] = 6e-7, 6e-7
    weight.values[4, :64] = weight.zeros[4, 0]
    found, rounded = conformed(weight, 64)
    assert rounded == {"a scale below 2^-14": 1}
    assert float(found.scales.min()) >= 2**-14
    difference = (found.dequantize().double() - meaning(weight)).abs()
    assert float(difference[4, :64].max()) == 0
    assert 0 < float(difference[6, 128:192].max()) <= 2**-15
    difference[6, 128:192] = 0
    assert float(difference.max()) == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "holds 0"), (-0.5, "holds -0.5"), (float("nan"), "not finite"), (float("inf"), "not finite"),
     (-float("inf"), "not finite"), (70000.0, "fp16 does not")],
)  # fmt: skip
def test_scales_that_mean_nothing_are_refused_by_name(value, words):
    scales = stored().scales.float()
    scales[3, 3] = value
    with pytest.raises(QuantizerError, match=f"tensor model.x.scales: .*{words}"):
        conformed(stored(scales=scales), name="model.x.scales")
