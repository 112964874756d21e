"""Rows of a tensor that holds several parameters: dealt out, and put back in the same order.

A row of a linear is an output channel. Whatever is kept per row (weights, 4-bit values, zero points, scales,
biases) can be dealt out and put back exactly. This module does not know names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split_rows(tensor: Tensor, sizes: Sequence[int], num_runs: int) -> list[Tensor]:
    """The parts of `tensor` [sum of `sizes`, ...], as many rows each as `sizes` says.

    It is made of `num_runs` runs, each with an equal share of every part in turn.
    """
    if len(sizes) == 1:
        return [tensor]
    runs = tensor.unflatten(0, (num_runs, -1))
    shares = runs.split([size // num_runs for size in sizes], dim=1)
    return [share.flatten(0, 1).contiguous() for share in shares]


def join_rows(parts: Sequence[Tensor], num_runs: int) -> Tensor:
    """The inverse of `split_rows`."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (num_runs, -1)) for part in parts], dim=1).flatten(0, 1)
