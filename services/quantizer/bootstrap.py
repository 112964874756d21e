"""How sure a measured mean is: percentile intervals from resampled windows. Knows no model.

Windows are drawn, not tokens: tokens of one window depend on each other, and an interval from tokens would
be too narrow. The same draws serve every figure, so that a ratio of two is judged on the same text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NUM_DRAWS = 1000
MIN_WINDOWS = 8
_MAX_UNITS = 1024
_SEED = 20


class Bootstrap:
    """Draws over `num_windows` windows; the same ones each time (Efron, 1979: the percentile method)."""

    def __init__(self, num_windows: int) -> None:
        # Very many windows are drawn in packs of neighbours, or drawing would take longer than measuring.
        self._num_units = min(num_windows, _MAX_UNITS)
        self._bounds = [round(i * num_windows / self._num_units) for i in range(self._num_units)]
        self._counts: NDArray[np.float64] | None = None
        if num_windows >= MIN_WINDOWS:
            generator = random.Random(_SEED)  # its stream is the same in every version
            self._counts = np.stack([self._draw(generator) for _ in range(NUM_DRAWS)])

    def interval(
        self, sums: list[NDArray[np.float64]], figure: Callable[..., NDArray[np.float64]]
    ) -> list[float] | None:
        """[low, high] of `figure`, which maps totals to a value, elementwise. `sums` holds one array
        [windows] per total. None below MIN_WINDOWS windows: it would promise what so few cannot hold.
        """
        if self._counts is None:
            return None
        totals = [self._counts @ np.add.reduceat(values, self._bounds) for values in sums]
        low, high = np.quantile(figure(*totals), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return [float(low), float(high)] if math.isfinite(low) and math.isfinite(high) else None

    def _draw(self, generator: random.Random) -> NDArray[np.float64]:
        picks = [generator.randrange(self._num_units) for _ in range(self._num_units)]
        return np.bincount(picks, minlength=self._num_units).astype(np.float64)
