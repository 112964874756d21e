"""A stored linear brought onto the grid of an artifact: fp16 scales of at least 2^-14, zero points 0 to 15,
runs of a fixed group size.

Exact wherever that grid holds the same numbers; what it cannot hold is counted by reason and either refused
or, when that is allowed, rounded. Knows neither files nor layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.quantizer import grid
from services.quantizer.errors import QuantizerError
from services.quantizer.grid import QuantizedWeight
from services.quantizer.importing.layouts import StoredWeight

GROUP_SIZES = (128, 64, 32)
_LARGEST_HALF = 65504.0


@dataclass(slots=True)
class Rounded:
    """Groups that an artifact cannot hold exactly, by reason."""

    groups: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, count: int) -> None:
        """Count groups; none are no reason."""
        if count:
            self.groups[reason] = self.groups.get(reason, 0) + count


def largest_group_size(num_in: int, num_groups: int, group_index: Tensor | None) -> int | None:
    """The largest of GROUP_SIZES that gives every run of inputs one group; None when there is none."""
    for size in GROUP_SIZES:
        if num_in % size:
            continue
        if group_index is None:
            if num_in // num_groups % size == 0:
                return size
        elif bool((group_index.view(-1, size) == group_index.view(-1, size)[:, :1]).all()):
            return size
    return None


def conform(stored: StoredWeight, name: str, group_size: int, rounded: Rounded) -> QuantizedWeight:
    """The same weight in groups of `group_size`; what had to be rounded is added to `rounded`. `name` is the
    tensor of the scales. Raises QuantizerError for scales that mean nothing.
    """
    _check_scales(stored.scales, name)
    num_in = stored.values.shape[1]
    group_of_run = _group_of_run(stored, group_size)
    if group_of_run is None:
        rounded.add("inputs in another order (act-order)", num_in // group_size * stored.values.shape[0])
        return grid.round_to_nearest(_dequantize(stored), group_size)
    zeros, scales = stored.zeros[:, group_of_run], stored.scales[:, group_of_run].float()
    values = stored.values.unflatten(1, (-1, group_size))
    zeros, values, is_beyond = _shift_large_zeros(zeros, values)
    is_tiny = (scales < grid.MIN_SCALE) & (values != zeros.unsqueeze(-1)).any(-1)
    scales = scales.clamp(min=grid.MIN_SCALE)  # a group of zeros alone takes any scale
    rounded.add("a zero point of 16", int(is_beyond.sum()))
    rounded.add("a scale below 2^-14", int((is_tiny & ~is_beyond).sum()))
    is_again = is_beyond | is_tiny
    halved = scales.half()
    rounded.add("a scale that is no fp16 number", int(((halved.float() != scales) & ~is_again).sum()))
    weight = QuantizedWeight(values.flatten(1), zeros.to(torch.uint8), halved)
    return _quantize_again(weight, _dequantize(stored), is_again) if bool(is_again.any()) else weight


def _check_scales(scales: Tensor, name: str) -> None:
    wide = scales.float()
    if not bool(torch.isfinite(wide).all()):
        raise QuantizerError(f"tensor {name}: holds values that are not finite")
    smallest, largest = float(wide.min()), float(wide.max())
    if smallest <= 0:
        raise QuantizerError(f"tensor {name}: holds {smallest:g}; scales are above zero")
    if largest > _LARGEST_HALF:
        raise QuantizerError(f"tensor {name}: holds {largest:g}, which fp16 does not")


def _group_of_run(stored: StoredWeight, group_size: int) -> Tensor | None:
    """int64 [in / group_size], or None when a run belongs to several groups."""
    num_in, num_groups = stored.values.shape[1], stored.zeros.shape[1]
    if stored.group_index is None:
        return torch.arange(num_in // group_size) // (num_in // num_groups // group_size)
    runs = stored.group_index.view(-1, group_size)
    return runs[:, 0] if bool((runs == runs[:, :1]).all()) else None


def _shift_large_zeros(zeros: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(zeros, values, where that fails): the zero 16 becomes 15 and every value one less, if none is 0. Where
    that fails, both mean nothing.
    """
    is_large = zeros > grid.MAX_VALUE
    is_beyond = is_large & (values == 0).any(-1)
    shifted = values - is_large.unsqueeze(-1).to(torch.uint8)
    return zeros.clamp(max=grid.MAX_VALUE), shifted, is_beyond


def _quantize_again(weight: QuantizedWeight, dense: Tensor, is_again: Tensor) -> QuantizedWeight:
    """`weight` with the groups that `is_again` marks rounded to nearest from `dense`."""
    groups = weight.zeros.shape[1]
    plain = grid.round_to_nearest(dense, dense.shape[1] // groups)
    values = torch.where(
        is_again.unsqueeze(-1),
        plain.values.unflatten(1, (groups, -1)),
        weight.values.unflatten(1, (groups, -1)),
    )
    zeros = torch.where(is_again, plain.zeros, weight.zeros)
    return QuantizedWeight(values.flatten(1), zeros, torch.where(is_again, plain.scales, weight.scales))


def _dequantize(stored: StoredWeight) -> Tensor:
    """fp32 [out, in], exactly what the source means."""
    num_in, num_groups = stored.values.shape[1], stored.zeros.shape[1]
    index = stored.group_index
    index = torch.arange(num_in) // (num_in // num_groups) if index is None else index
    return (stored.values.to(torch.int16) - stored.zeros[:, index]).float() * stored.scales[:, index].float()
