"""What a report tells of one linear: numbers only, the same for the same inputs. Knows no report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from services.quantizer.fitting import shrink_factors
from services.quantizer.grid import QuantizedWeight
from services.quantizer.scales import Candidate
from weft.artifact.manifest import LinearError

_BINS = 64
_COUNTED_AT_ONCE = 1 << 23


def linear_record(
    weight: Tensor,
    effective: Tensor,
    quantized: QuantizedWeight,
    candidate: Candidate,
    method: str,
    error: LinearError,
    held_out: dict[str, float],
    rows: Tensor | None,
) -> dict[str, Any]:
    """`weight` [out, in] of the source and what it became, both seen from outside of the folding;
    `rows` [out] is what its rows were divided by.

    `held_out` is per method ||exact outputs - outputs||^2 in parts of the outputs' energy, on windows that
    the fit did not see; `shrink` by how much the grids are narrower than the weights at either end, on
    average; the histograms count weights between `low` and `high`, the source's extremes.
    """
    low, high = float(weight.min()), float(weight.max())
    scaled = weight * candidate.scales if rows is None else weight * candidate.scales / rows.unsqueeze(1)
    source, chosen = (_histogram(tensor, low, high) for tensor in (weight, effective))
    return {
        "method": method,
        "scales": candidate.label,
        "rounding": error.rounding,
        "chosen": error.chosen,
        "held_out": held_out,
        "shrink": shrink_factors(scaled, quantized),
        "histogram": {"low": low, "high": high, "source": source, "chosen": chosen},
    }


def _histogram(tensor: Tensor, low: float, high: float) -> list[int]:
    """Values beyond the ends count as the ends."""
    if not high > low:
        return [tensor.numel()] + [0] * (_BINS - 1)
    counts = torch.zeros(_BINS, dtype=torch.int64)
    # It counts in the tensor's own dtype, and fp32 ends at 2^24: a part at a time stays below.
    for part in tensor.flatten().split(_COUNTED_AT_ONCE):
        counts += torch.histc(part.clamp(low, high).cpu(), _BINS, low, high).long()
    return [int(count) for count in counts]
