"""How a linear's integers are found, by four methods; and how well each does on windows it has not seen.

    rounding  to nearest, over the full range: what every other method must beat
    clip      both ends of each group's range shrunk by one factor, judged within the group (AWQ)
    search    both ends shrunk independently, judged exactly, with the terms between groups
    gptq      the searched ranges, a GPTQ sweep, then integers and grids refined in turn
    gptaq     the same, but towards the weight that makes up best for what the inputs have lost

All judge through H = X^T X. For the last, with inputs X where the source would have X + D, the error of a
weight W' = W + E is ||(X + D) W^T - X W'^T||^2 = ||D W^T||^2 + tr(E H E^T) - 2 tr(P E^T), P = W D^T X, whose
minimum without a grid is at E = P H^-1 (Li et al., 2025, asymmetric calibration). Tasks here are pure
functions of tensors. This module does not know models, nor who else shares the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.quantizer.clipping import search_ranges
from services.quantizer.gptq import Factor, factorize, sweep
from services.quantizer.grid import QuantizedWeight, full_range, grid, quantize, round_to_nearest
from services.quantizer.refinement import descend, refit

ROUNDING, CLIP, SEARCH, GPTQ, GPTAQ = "rounding", "clip", "search", "gptq", "gptaq"
_REFINEMENTS = 2


@dataclass(frozen=True, slots=True)
class Inputs:
    """`gram` [in, in] = X^T X and, for the rows W at hand, `pull` [rows, in] = W D^T X, or None where nothing
    was lost.
    """

    gram: Tensor
    pull: Tensor | None

    def scaled_gram(self, scales: Tensor) -> Tensor:
        """Of the inputs divided by `scales` [in]."""
        return (self.gram / scales).div_(scales.unsqueeze(1))


@dataclass(frozen=True, slots=True)
class FitTask:
    """Some rows of one linear: `weight` fp32 [rows, in], the scales [in] its columns are multiplied by."""

    weight: Tensor
    scales: Tensor
    inputs: Inputs
    group_size: int
    method: str


@dataclass(frozen=True, slots=True)
class TrialTask:
    """Some rows of one linear, fitted on `inputs` and judged on `held`."""

    weight: Tensor
    scales: Tensor
    inputs: Inputs
    held: Inputs
    group_size: int
    methods: tuple[str, ...]


def fit_rows(task: FitTask) -> QuantizedWeight:
    """The integers for `weight` times `scales`."""
    return _Fitter(task.weight, task.scales, task.inputs, task.group_size).fit(task.method)


def try_methods(task: TrialTask) -> dict[str, float]:
    """Per method, and for plain rounding without scales, the error on the held-out inputs in parts of the
    outputs' energy there, less what W itself would get wrong. May be negative.
    """
    fitter = _Fitter(task.weight, task.scales, task.inputs, task.group_size)
    pull = task.held.pull
    energy = max(_total((task.weight @ task.held.gram) * task.weight), torch.finfo(torch.float32).tiny)
    weights = {ROUNDING: round_to_nearest(task.weight, task.group_size).dequantize()}
    losses = {}
    for method in (ROUNDING, *task.methods):
        found = weights.pop(method, None)
        if found is None:
            found = fitter.fit(method).dequantize() / task.scales
        error = found - task.weight
        loss = _total((error @ task.held.gram) * error)
        if pull is not None:
            loss -= 2.0 * _total(pull * error)
        losses[method] = loss / energy
    return losses


class _Fitter:
    """Fits rows by several methods; what they share is computed once."""

    def __init__(self, weight: Tensor, scales: Tensor, inputs: Inputs, group_size: int) -> None:
        self._scaled = weight * scales
        self._pull = None if inputs.pull is None else inputs.pull / scales
        self._gram = inputs.scaled_gram(scales)
        self._group_size = group_size
        self._factor: Factor | None = None

    def fit(self, method: str) -> QuantizedWeight:
        if method == ROUNDING:
            return round_to_nearest(self._scaled, self._group_size)
        if method == CLIP:
            return quantize(self._scaled, *self._ranges(self._scaled, is_symmetric=True))
        if method == SEARCH:
            return quantize(self._scaled, *self._ranges(self._scaled, sweeps=2))
        if self._factor is None:
            self._factor = factorize(self._gram)
        target = self._scaled
        if method == GPTAQ and self._pull is not None:
            target = target + self._factor.solve(self._pull)
        scales, zeros = grid(*self._ranges(target))
        values = sweep(target, self._factor, scales, zeros)
        for _ in range(_REFINEMENTS):
            scales, zeros = refit(values, target, self._gram, scales, zeros)
            values = descend(values, target, self._gram, scales, zeros)
        return QuantizedWeight(values.to(torch.uint8), zeros.to(torch.uint8), scales.half())

    def _ranges(
        self, weight: Tensor, sweeps: int = 1, *, is_symmetric: bool = False
    ) -> tuple[Tensor, Tensor]:
        return search_ranges(weight, self._gram, self._group_size, sweeps, is_symmetric=is_symmetric)


def shrink_factors(scaled: Tensor, quantized: QuantizedWeight) -> dict[str, float]:
    """How much of the weights' own range the grids span, at either end, on average."""
    low, high = full_range(scaled.unflatten(1, (quantized.zeros.shape[1], -1)))
    scales, zeros = quantized.scales.float(), quantized.zeros.float()
    ends = {"low": (-zeros * scales, low), "high": ((15 - zeros) * scales, high)}
    return {
        name: float(f"{float((end / own)[own != 0].mean()):.6g}") if bool((own != 0).any()) else 1.0
        for name, (end, own) in ends.items()
    }


def sample_rows(weight: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spread."""
    return weight[:: max(1, -(-len(weight) // count))]


def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Rows below each other."""
    return QuantizedWeight(
        torch.cat([part.values for part in parts]),
        torch.cat([part.zeros for part in parts]),
        torch.cat([part.scales for part in parts]),
    )


def _total(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))
