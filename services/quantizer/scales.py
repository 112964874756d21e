"""Candidates for the scales of one group, and how a candidate changes weights: activation-aware weight
quantization.

Multiplying an input channel's weights by s > 1 before rounding, and dividing what comes out of the
channel's producer by s, makes that channel's rounding error smaller by s. Channels with large activations
deserve it (Lin et al., 2023). Candidates:

    identity           s = 1
    x-only             s = mean|x|^r
    duo                s = mean|x|^r / (mean over rows of |w| / max of its group)^(1 - r)

each normalised by sqrt(max s * min s). This module does not know models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.quantizer.gptq import factorize
from services.quantizer.grid import full_range, grid, round_to_nearest

_LEAST = 1e-4
_STEP = 0.05
_REFINEMENT = 0.025
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Candidate:
    """`scales` fp32 [in], and where they come from."""

    method: str
    ratio: float
    scales: Tensor

    @property
    def label(self) -> str:
        return "identity" if self.method == "identity" else f"{self.method} {self.ratio:.3f}"


@dataclass(frozen=True, slots=True)
class ScaleSpace:
    """Everything a candidate is made from.

    Attributes:
        x_mean: fp32 [in], mean |x| over the calibration tokens.
        w_mean: fp32 [in], see `weight_means`.
        num_repeats: how many heads in a row read one channel of the producer (1 unless grouped-query).
        head_size: channels per head, for the same purpose.
        producer: what is divided by the scales and stored: a norm's weight, a bias, or None when the producer
            is quantized itself and has nothing else.
        dtype: of the producer on disk.
        is_norm: whether the producer is a norm's weight.
        offset: what the norm adds to its stored weight before it multiplies.
    """

    x_mean: Tensor
    w_mean: Tensor
    num_repeats: int
    head_size: int
    producer: Tensor | None
    dtype: torch.dtype
    is_norm: bool
    offset: float = 0.0

    def make(self, method: str, ratio: float) -> Candidate:
        """One candidate, its scales such that the producer, divided and stored, loses nothing."""
        if method == "identity":
            return Candidate(method, 0.0, torch.ones_like(self.x_mean))
        scales = self.x_mean.clamp(min=_LEAST) ** ratio
        if method == "duo":
            scales = scales / (self.w_mean ** (1.0 - ratio) + _LEAST)
        scales = self._shared(scales.clamp(min=_LEAST))
        scales = scales / torch.sqrt(scales.max() * scales.min())
        scales = torch.where(torch.isfinite(scales) & (scales > 0), scales, torch.ones_like(scales))
        return Candidate(method, ratio, self.representable(scales))

    def representable(self, scales: Tensor) -> Tensor:
        """The nearest scales by which the producer can be divided exactly in its stored dtype.

        Where the stored producer / s rounds to p', s becomes producer / p'. A norm's channel of weight 0
        carries no signal: it keeps 1. Of a norm that adds an offset, the weight is what it adds up to.
        """
        if self.producer is None:
            return scales
        producer = self.producer if self.num_repeats == 1 else self._expand(self.producer)
        producer = producer + self.offset
        stored = (producer / scales - self.offset).to(self.dtype).float() + self.offset
        exact = producer / stored
        is_usable = (stored != 0) & torch.isfinite(stored) & torch.isfinite(exact) & (exact > 0)
        # A bias that is 0, or too small to be stored, leaves the scale as it is; one too large forbids it.
        is_free = (stored == 0) & (not self.is_norm)
        return torch.where(is_usable, exact, torch.where(is_free, scales, torch.ones_like(scales)))

    def producer_scales(self, scales: Tensor) -> Tensor:
        """[out of the producer] from scales [in] that already agree over the repeats."""
        return one_per_producer(scales, self.num_repeats, self.head_size)

    def _shared(self, scales: Tensor) -> Tensor:
        """One producer channel feeds several input channels under grouped-query attention: they take the
        mean.
        """
        if self.num_repeats == 1:
            return scales
        return self._expand(scales.view(-1, self.num_repeats, self.head_size).mean(1).reshape(-1))

    def _expand(self, per_producer: Tensor) -> Tensor:
        heads = per_producer.view(-1, 1, self.head_size)
        return heads.expand(-1, self.num_repeats, -1).reshape(-1)


def one_per_producer(scales: Tensor, num_repeats: int, head_size: int) -> Tensor:
    """[out of the producer] from scales [in] that agree over the heads that share a producer's."""
    return scales if num_repeats == 1 else scales.view(-1, num_repeats, head_size)[:, 0].reshape(-1)


def weight_means(weights: list[Tensor], group_size: int) -> Tensor:
    """[in]: mean over all rows of |w| relative to the largest of its (row, group)."""
    total = torch.zeros_like(weights[0][0])
    for weight in weights:
        for rows in weight.split(_ROWS_AT_ONCE):
            grouped = rows.abs().unflatten(1, (-1, group_size))
            total += (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).flatten(1).sum(0)
    return total / sum(len(weight) for weight in weights)


@dataclass(frozen=True, slots=True)
class ScaleTask:
    """What the scales of one group are chosen by.

    Attributes:
        space: where candidates come from.
        weight: fp32 [rows, in], rows of all linears that share the input.
        importance: fp32 [rows], by what a row's error counts.
        gram: fp32 [in, in].
        group_size: input channels that share a grid.
        is_swept: the integers will come from a sweep that makes up for errors, not from rounding.
    """

    space: ScaleSpace
    weight: Tensor
    importance: Tensor
    gram: Tensor
    group_size: int
    is_swept: bool


def rank_scales(task: ScaleTask) -> list[Candidate]:
    """All candidates, the best first."""
    return rank_candidates(task.space, _sweep_loss(task) if task.is_swept else _rounding_loss(task))


def _rounding_loss(task: ScaleTask) -> Callable[[Tensor], float]:
    """The error of plain rounding, exactly."""

    def loss(scales: Tensor) -> float:
        rounded = round_to_nearest(task.weight * scales, task.group_size).dequantize() / scales
        error = rounded - task.weight
        return float(((error @ task.gram) * error).sum(1) @ task.importance)

    return loss


def _sweep_loss(task: ScaleTask) -> Callable[[Tensor], float]:
    """What a sweep can be expected to leave: step^2 / 12 per weight, times what of the column the columns
    behind it cannot make up for, 1 / U_jj^2 of the factor. Scales divide the steps' weight by s_j^2 and leave
    the factor as it is, so a candidate costs no product of matrices.
    """
    own = task.gram.diagonal()
    size = torch.where(own > 0, own, torch.ones_like(own)).sqrt()
    factor = factorize((task.gram / size).div_(size.unsqueeze(1)))
    remainder = torch.empty_like(own)
    remainder[factor.order] = factor.upper.diagonal().square().reciprocal()
    remainder = remainder * own

    def loss(scales: Tensor) -> float:
        steps, _ = grid(*full_range((task.weight * scales).unflatten(1, (-1, task.group_size))))
        per_group = (remainder / scales.square()).view(-1, task.group_size).sum(1)
        return float((steps.square() @ per_group) @ task.importance) / 12.0

    return loss


def rank_candidates(space: ScaleSpace, loss: Callable[[Tensor], float]) -> list[Candidate]:
    """All candidates by ascending `loss` of their scales; the best of each family is refined once."""
    steps = [round(_STEP * i, 3) for i in range(21)]
    points = [("identity", 0.0)] + [("x-only", r) for r in steps[1:]] + [("duo", r) for r in steps]

    def judge(method: str, ratio: float) -> tuple[float, Candidate]:
        candidate = space.make(method, ratio)
        value = loss(candidate.scales)
        return value if math.isfinite(value) else math.inf, candidate  # NaN has no place in an order

    judged = [judge(*point) for point in points]
    for method in ("x-only", "duo"):
        best = min((pair for pair in judged if pair[1].method == method), key=lambda pair: pair[0])[1].ratio
        near = [round(best + d, 3) for d in (-_REFINEMENT, _REFINEMENT) if 0.0 <= best + d <= 1.0]
        judged += [judge(method, ratio) for ratio in near]
    return [candidate for _, candidate in sorted(judged, key=lambda pair: pair[0])]
