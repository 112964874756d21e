"""Clip search: shrink the lowest and the highest value of each group's range, each by its own factor.

A narrower range rounds most weights finer and clips a few. What counts is the linear's output error over
the calibration inputs X, which their Gram matrix H = X^T X gives exactly: ||X E^T||^2 = sum over rows e of
e H e^T, E = W' - W. Rows are independent. Groups of a row are not, so they are visited in turn, each judged
with the errors of the others in place; a group moves only when the row's error falls, so the result is
never worse than the full range it begins with.

AWQ (Lin et al., 2023) searches a symmetric clip per group and ignores the terms between groups; that is here
as well. This module does not know of scales between layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.quantizer.grid import full_range, grid, snap

COARSE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
CLIP = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
FINE = (-0.0333, -0.0167, 0.0, 0.0167, 0.0333)


def search_ranges(
    weight: Tensor, gram: Tensor, group_size: int, sweeps: int = 1, *, is_symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Ranges (low, high), [out, in/group] each, for fp32 `weight` [out, in] and `gram` [in, in]. With
    `is_symmetric` both ends shrink by one factor and groups are judged alone.
    """
    grouped = weight.unflatten(1, (-1, group_size))
    low, high = full_range(grouped)
    error = (snap(grouped, *grid(low, high)) - grouped).flatten(1)
    for _ in range(sweeps):
        for group in range(grouped.shape[1]):
            columns = slice(group * group_size, (group + 1) * group_size)
            own = gram[columns, columns]
            ends = grouped[:, group], low[:, group], high[:, group]
            if is_symmetric:
                best = _clip_group(own, *ends)
            else:
                pull = 2.0 * (error @ gram[:, columns] - error[:, columns] @ own)
                best = _search_group(own, pull, *ends)
            low[:, group], high[:, group] = best
            error[:, columns] = snap(grouped[:, group], *grid(*best)) - grouped[:, group]
    return low, high


def _clip_group(own: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The best (low, high) [rows] for one group by one factor for both ends."""
    best = _Best(weight, own, torch.zeros_like(weight), low, high)
    bottom, top = full_range(weight)
    for shrink in CLIP:
        best.try_all(bottom * shrink, (top * shrink).unsqueeze(0))
    return best.low, best.high


def _search_group(
    own: Tensor, pull: Tensor, weight: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The best (low, high) [rows] for one group: a coarse grid of both factors, then a fine one around its
    best.
    """
    bottom, top = full_range(weight)
    best = _Best(weight, own, pull, low, high)
    for shrink in COARSE:
        best.try_all(bottom * shrink, top * _column(COARSE, weight))
    # Where an end is zero its factor means nothing: any will do.
    lows = torch.where(bottom < 0, best.low / bottom, torch.ones_like(bottom))
    highs = torch.where(top > 0, best.high / top, torch.ones_like(top))
    for step in FINE:
        best.try_all(bottom * (lows + step), top * (highs + _column(FINE, weight)))
    return best.low, best.high


def _column(factors: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(factors, dtype=like.dtype, device=like.device).unsqueeze(1)


class _Best:
    """Per row the range with the least e own e^T + pull e^T so far."""

    def __init__(self, weight: Tensor, own: Tensor, pull: Tensor, low: Tensor, high: Tensor) -> None:
        self._weight, self._own, self._pull = weight, own, pull
        self.low, self.high = low.clone(), high.clone()
        self._loss = self._judge(low.unsqueeze(0), high.unsqueeze(0))[0]

    def try_all(self, low: Tensor, high: Tensor) -> None:
        """Take over every row's best of several ranges: `low` [rows], `high` [candidates, rows]."""
        low = low.expand_as(high)
        loss, index = self._judge(low, high).min(0, keepdim=True)
        is_better = loss[0] < self._loss
        self._loss = torch.where(is_better, loss[0], self._loss)
        self.low = torch.where(is_better, low.gather(0, index)[0], self.low)
        self.high = torch.where(is_better, high.gather(0, index)[0], self.high)

    def _judge(self, low: Tensor, high: Tensor) -> Tensor:
        """[candidates, rows]. Candidates go together because one large operation beats many small ones."""
        error = snap(self._weight, *grid(low, high)).sub_(self._weight)
        return (error @ self._own).add_(self._pull).mul_(error).sum(-1)
