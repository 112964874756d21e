"""What is left to gain once integers are found: integers and grids in turn, each step exact and none a loss.

The error of a row is e H e^T with e = w' - t over all of its columns. With everything else held fixed the
best integer of one column is a division and a rounding away (coordinate descent, as in QuantEase, Behdin et
al., 2023), and the best scale of one group is the minimum of a parabola. Rows are independent. This module
does not know where the first integers came from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.quantizer.grid import MAX_VALUE, MIN_SCALE

_BLOCK = 128
_MAX_SCALE = 65504.0


def descend(values: Tensor, target: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """One sweep over the columns: better integers, fp32 [out, in], for the same grids.

    `values` and `target` [out, in], `gram` [in, in], `scales` and `zeros` fp32 [out, in/group].
    """
    num_in = target.shape[1]
    group_size = num_in // scales.shape[1]
    slope = gram @ (dequantized(values, scales, zeros) - target).T
    found = values.T.contiguous()
    scale = scales.T.contiguous()
    own = gram.diagonal().tolist()
    for begin in range(0, num_in, _BLOCK):
        end = min(begin + _BLOCK, num_in)
        near = slope[begin:end].clone()
        moves = torch.zeros_like(near)
        for j in range(begin, end):
            if not own[j] > 0:
                continue  # nobody sees this column
            step = scale[j // group_size]
            value = (found[j] - near[j - begin] / (step * own[j])).round_().clamp_(0, MAX_VALUE)
            move = (value - found[j]).mul_(step)
            found[j], moves[j - begin] = value, move
            near[j + 1 - begin :].addr_(gram[j, j + 1 : end], move)
        slope.addmm_(gram[:, begin:end], moves)
    return found.T.contiguous()


def refit(
    values: Tensor, target: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """(scales, zeros) that suit the integers better: per group the best fp16 scale for the zero as it is and
    for its two neighbours, taken only where the row's error falls.
    """
    scales, zeros = scales.clone(), zeros.clone()
    group_size = target.shape[1] // scales.shape[1]
    slope = (dequantized(values, scales, zeros) - target) @ gram
    for group in range(scales.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        own = gram[columns, columns]
        integers = values[:, columns]
        before = (integers - zeros[:, group, None]) * scales[:, group, None]
        others = slope[:, columns] - before @ own
        least = ((before @ own + 2.0 * others) * before).sum(1)
        best_scale, best_zero = scales[:, group].clone(), zeros[:, group].clone()
        for shift in (0, -1, 1):
            zero = zeros[:, group] + shift
            shape = integers - zero[:, None]
            curvature = ((shape @ own) * shape).sum(1)
            pull = (others * shape).sum(1)
            scale = (-pull / curvature).clamp(MIN_SCALE, _MAX_SCALE).half().float()
            error = scale * (scale * curvature + 2.0 * pull)
            # A comparison with what is no number is false.
            is_better = (error < least) & (zero >= 0) & (zero <= MAX_VALUE)
            least = torch.where(is_better, error, least)
            best_scale = torch.where(is_better, scale, best_scale)
            best_zero = torch.where(is_better, zero, best_zero)
        scales[:, group], zeros[:, group] = best_scale, best_zero
        after = (integers - best_zero[:, None]) * best_scale[:, None]
        slope.addmm_(after - before, gram[columns])
    return scales, zeros


def dequantized(values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """fp32 [out, in]."""
    grouped = values.unflatten(1, (scales.shape[1], -1))
    return ((grouped - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(1)
