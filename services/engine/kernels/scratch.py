"""Buffers for what lives only within one call, kept between calls.

A fresh tensor of some MiB costs more in page faults than the copy that fills it; these are faulted in once.
One thread runs a model, so a buffer has one user at a time; each use has its own name. Knows sizes only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CPU = torch.device("cpu")


class Scratch:
    """Named flat buffers that grow to the largest size asked for."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device = _CPU,
    ) -> Tensor:
        """A contiguous tensor with unspecified contents, valid until the same name is taken again."""
        numel = math.prod(shape)
        buffer = self._buffers.get((name, dtype, device))
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=dtype, device=device)
            self._buffers[name, dtype, device] = buffer
        return buffer[:numel].view(shape)
