"""The integers of the linears that share one input, under given scales.

The methods are tried on some rows of each linear and ranked on held-out inputs; the best is fitted on all
rows, a set of them at a time, and the next one wherever that would be worse than rounding. This module does
not know where the scales come from, nor what else is in the block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from services.quantizer.config import BEST
from services.quantizer.fitting import (
    CLIP,
    GPTAQ,
    GPTQ,
    ROUNDING,
    SEARCH,
    FitTask,
    Inputs,
    TrialTask,
    fit_rows,
    join,
    sample_rows,
    try_methods,
)
from services.quantizer.grid import QuantizedWeight
from services.quantizer.guard import RoundingGuard, nonzero_energy
from services.quantizer.model_map import ScaleGroup
from services.quantizer.scales import Candidate
from services.quantizer.source import Weights
from services.quantizer.statistics import Moments
from services.quantizer.workers import WorkerPool

SAMPLED_ROWS = 256
"""Of a linear, at most: what methods and scales are judged by."""

_MEANS = {"awq": (CLIP,), "awq+": (SEARCH,), "gptq": (GPTQ,), BEST: (GPTAQ, GPTQ, SEARCH)}
"""Per method of the configuration, the ways to find integers, the likeliest first."""
_WEIGHTS_PER_TASK = 4 << 20
_MAX_ROWS_PER_TASK = 2048


@dataclass(frozen=True, slots=True)
class Fit:
    """Integers of one linear, the weight [out, in] that they mean, seen from outside of all folding, the
    method that found them, and the error that is left.
    """

    quantized: QuantizedWeight
    effective: Tensor
    method: str
    error: float


class GroupFitter:
    """Fits the linears of one block, a group at a time. `methods` are those worth a trial."""

    def __init__(
        self,
        weights: Weights,
        group_size: int,
        methods: tuple[str, ...],
        pool: WorkerPool,
        guard: RoundingGuard,
    ) -> None:
        self._weights, self._group_size, self._methods = weights, group_size, methods
        self._pool, self._guard = pool, guard

    def rank_methods(
        self, group: ScaleGroup, candidate: Candidate, fitted: Moments, held: Moments
    ) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
        """Per linear the methods worth a fit, the best first, and what each made of the held-out inputs."""
        tasks = [
            TrialTask(
                sample_rows(self._weights[f"{name}.weight"], SAMPLED_ROWS),
                candidate.scales,
                _sampled_inputs(fitted, name),
                _sampled_inputs(held, name),
                self._group_size,
                self._methods,
            )
            for name in group.linears
        ]
        orders, told = {}, {}
        for name, losses in zip(group.linears, self._pool.map(try_methods, tasks), strict=True):
            ranked = sorted(
                losses, key=lambda method: losses[method] if losses[method] == losses[method] else math.inf
            )
            orders[name] = ranked[: ranked.index(ROUNDING)]
            if candidate.method == "identity":
                orders[name].append(ROUNDING)
            energy = nonzero_energy(self._weights[f"{name}.weight"], held.gram)
            told[name] = {m: _short(max(loss + held.gap[name] / energy, 0.0)) for m, loss in losses.items()}
        return orders, told

    def fit(
        self, group: ScaleGroup, candidate: Candidate, fitted: Moments, orders: dict[str, list[str]]
    ) -> dict[str, Fit] | None:
        """Of every linear, by the first method in its order that is no worse than rounding; None if one has
        no such method. Raises QuantizerError if weights are too large for fp16 scales.
        """
        left = {name: list(order) for name, order in orders.items()}
        found: dict[str, Fit] = {}
        while left:
            if not all(left.values()):
                return None
            methods = {name: order.pop(0) for name, order in left.items()}
            tasks = [
                (name, FitTask(rows, candidate.scales, inputs, self._group_size, method))
                for name, method in methods.items()
                for rows, inputs in self._parts(name, fitted)
            ]
            results = self._pool.map(fit_rows, [task for _, task in tasks])
            for name, method in methods.items():
                quantized = join([r for (n, _), r in zip(tasks, results, strict=True) if n == name])
                effective = quantized.dequantize() / candidate.scales
                error = self._guard.error(name, effective, fitted.gram)
                if self._guard.allows(name, error):
                    found[name] = Fit(quantized, effective, method, error)
                    del left[name]
                elif method == ROUNDING:
                    raise self._guard.refusal(name, "too large for fp16 scales")
        return found

    def _parts(self, name: str, moments: Moments) -> list[tuple[Tensor, Inputs]]:
        """Rows of a linear that are fitted at once, and what is known of its inputs."""
        parts = _split(self._weights[f"{name}.weight"])
        pulls = _split(moments.pulls[name]) if name in moments.pulls else [None] * len(parts)
        return [(rows, Inputs(moments.gram, pull)) for rows, pull in zip(parts, pulls, strict=True)]


def methods_worth_trying(method: str, num_windows: int, *, has_exact: bool) -> tuple[str, ...]:
    """For a method of the configuration. Of several, a sweep needs windows to be judged on that it has not
    seen: on one alone it fits what it sees and nothing else, while a search of ranges cannot stray far. And
    what the inputs have lost is known with an exact stream only.
    """
    if method == BEST and num_windows == 1:
        return (SEARCH,)
    return tuple(means for means in _MEANS[method] if means != GPTAQ or has_exact)


def max_rows_at_once(num_in: int) -> int:
    """Rows that are fitted at once: few where they are long, for a fit takes some ten times their memory."""
    rows = _WEIGHTS_PER_TASK // num_in // SAMPLED_ROWS * SAMPLED_ROWS
    return min(_MAX_ROWS_PER_TASK, max(SAMPLED_ROWS, rows))


def _sampled_inputs(moments: Moments, name: str) -> Inputs:
    """For the rows that `sample_rows` takes of a linear."""
    pull = moments.pulls.get(name)
    return Inputs(moments.gram, None if pull is None else sample_rows(pull, SAMPLED_ROWS))


def _split(weight: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = weight.split(max_rows_at_once(weight.shape[1]))
    return parts


def _short(value: float) -> float:
    return float(f"{value:.6g}")
