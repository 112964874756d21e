"""How far a block's linears are from the source, and that none is further than by rounding.

An error is ||X (W' - W)^T||^2 in parts of ||X W^T||^2. This module knows weights and Gram matrices; it does
not know how integers or scales were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from services.quantizer.errors import QuantizerError
from services.quantizer.grid import round_to_nearest
from services.quantizer.source import Weights
from services.quantizer.statistics import output_energy

_TINY = torch.finfo(torch.float32).tiny


class RoundingGuard:
    """Of one block; `full_name` takes a linear's name to the checkpoint's, for messages.

    Attributes:
        rounding: per linear that was measured, the error of rounding to nearest without scales.
    """

    def __init__(self, weights: Weights, group_size: int, full_name: Callable[[str], str]) -> None:
        self._weights, self._group_size, self._full_name = weights, group_size, full_name
        self._energy: dict[str, float] = {}
        self.rounding: dict[str, float] = {}

    def require_finite(self, name: str, gram: Tensor) -> None:
        """Raises QuantizerError if the inputs of a linear, by `gram` [in, in], are not all finite."""
        if not torch.isfinite(gram.diagonal()).all():
            raise self._not_finite(name)

    def measure(self, name: str, gram: Tensor) -> None:
        """What errors of a linear are measured by from now on. Raises QuantizerError if its outputs are not
        finite.
        """
        weight = self._weights[f"{name}.weight"]
        energy = nonzero_energy(weight, gram)
        if not math.isfinite(energy):
            raise self._not_finite(name)
        self._energy[name] = energy
        rounded = round_to_nearest(weight, self._group_size).dequantize()
        self.rounding[name] = self.error(name, rounded, gram)

    def error(self, name: str, effective: Tensor, gram: Tensor) -> float:
        """Of `effective` [out, in], seen from outside of all folding, in the place of the linear's weight."""
        return output_energy(effective - self._weights[f"{name}.weight"], gram) / self._energy[name]

    def allows(self, name: str, error: float) -> bool:
        """Whether an error is no larger than rounding's; one that is no number is not allowed."""
        return error <= self.rounding[name]

    def refusal(self, name: str, reason: str) -> QuantizerError:
        """To be raised about a linear."""
        return QuantizerError(f"tensor {self._full_name(name)}.weight: {reason}")

    def _not_finite(self, name: str) -> QuantizerError:
        return self.refusal(name, "its inputs or outputs on the text are not finite")


def nonzero_energy(weight: Tensor, gram: Tensor) -> float:
    """`output_energy`, large enough to divide by."""
    return max(output_energy(weight, gram), _TINY)
