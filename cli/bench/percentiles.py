"""Percentiles and means of many numbers, in plain Python: the base install has no numpy. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

PERCENTS = (50, 90, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted numbers, by linear interpolation between the two nearest ranks (numpy's default).
    Raises ValueError for none.
    """
    if not ordered:
        raise ValueError("no numbers")
    position = (len(ordered) - 1) * percent / 100.0
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def distribution(values: Iterable[float], scale: float = 1.0) -> dict[str, float | int | None]:
    """count, mean, min, p50, p90, p99 and max; the numbers times `scale`. Of none, every value is None."""
    ordered = sorted(values)
    found: dict[str, float | int | None] = {"count": len(ordered)}
    if not ordered:
        return found | dict.fromkeys(("mean", "min", *(f"p{p}" for p in PERCENTS), "max"))
    found["mean"] = math.fsum(ordered) / len(ordered) * scale
    found["min"] = ordered[0] * scale
    found |= {f"p{p}": percentile(ordered, p) * scale for p in PERCENTS}
    found["max"] = ordered[-1] * scale
    return found
