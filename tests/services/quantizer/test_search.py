"""The search's guards: nothing worse than rounding, nothing that cannot be stored, no NaN in an order."""

import pytest
import torch

import services.quantizer.group_fitting as group_fitting
from services.quantizer.config import BEST, METHODS
from services.quantizer.fitting import ROUNDING, fit_rows
from services.quantizer.grid import full_range, quantize
from services.quantizer.quantize import BlockQuantizer
from services.quantizer.scales import ScaleSpace, rank_candidates
from services.quantizer.source import Source


@torch.inference_mode()
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_search_leaves_rounding(make_checkpoint, monkeypatch, method):
    """Whatever the search comes back with: identity first, rounding itself where that is not enough."""

    def halve(task):
        if task.method == ROUNDING:
            return fit_rows(task)
        low, high = full_range((task.weight * task.scales).unflatten(1, (-1, task.group_size)))
        return quantize(task.weight * task.scales, low / 2, high / 2)

    monkeypatch.setattr(group_fitting, "fit_rows", halve)
    source = Source(make_checkpoint("Qwen2"), torch.device("cpu"))
    hidden = source.embed(torch.randint(0, 4096, (2, 50), generator=torch.Generator().manual_seed(0)))
    exact = hidden.clone() if method == BEST else None
    weights = source.block_weights(0)
    block = BlockQuantizer(source, 0, weights, hidden, 32, set(), method=method, exact=exact).run()
    assert len(block.errors) == 7
    for name, error in block.errors.items():
        assert 0 < error.chosen <= error.rounding, name
        assert block.records[name]["method"] == ROUNDING


def space(producer, is_norm=False, dtype=torch.float16):
    ones = torch.ones(32)
    return ScaleSpace(ones, ones, 1, 1, torch.tensor(producer).to(dtype).float().expand(32), dtype, is_norm)


@pytest.mark.parametrize("is_norm", [False, True])
@pytest.mark.parametrize("value", [0.0, 6e4, -6e4, 1e-7, -1e-3, 1.0])
def test_what_is_divided_by_the_scales_can_be_stored(is_norm, value):
    candidate = space(value, is_norm)
    scales = candidate.representable(torch.logspace(-2, 2, 32))
    stored = (candidate.producer / scales).half().float()
    assert torch.isfinite(stored).all()
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    # What is stored times the scale is what was there, but for a bias too small for the type.
    assert torch.allclose(stored * scales, candidate.producer, rtol=1e-6, atol=0 if is_norm else 1e-5)


def test_a_loss_that_is_no_number_ranks_last():
    candidates = rank_candidates(
        ScaleSpace(torch.linspace(0.1, 9, 32), torch.ones(32), 1, 1, None, torch.float32, True),
        lambda scales: float("nan") if scales.max() > 1.5 else float(scales.max()),
    )
    assert candidates[0].method == "identity" or candidates[0].scales.max() <= 1.5
    finite = [bool(candidate.scales.max() <= 1.5) for candidate in candidates]
    assert finite == sorted(finite, reverse=True)
    assert 1 < sum(finite) < len(finite)
