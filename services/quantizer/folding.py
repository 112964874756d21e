"""Fold scales into a block: multiply the columns of a group's linears, divide what produces their input.

In full precision the folded block computes the same function; a test per architecture holds that. This module
does not know how scales are found, nor that weights are quantized afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.quantizer.model_map import ScaleGroup
from services.quantizer.source import Weights


@dataclass(frozen=True, slots=True)
class Folding:
    """What folding does to a block.

    Attributes:
        columns: per linear [in], what its columns are multiplied by.
        rows: per linear [out], what its rows are divided by; absent means 1.
        parameters: the block's parameters with norms and biases divided already, linears' weights untouched.
    """

    columns: Weights
    rows: Weights
    parameters: Weights

    def inner(self, linear: str) -> Tensor:
        """A linear's weight [out, in] with its rows divided, its columns not yet multiplied."""
        weight = self.parameters[f"{linear}.weight"]
        return weight / self.rows[linear].unsqueeze(1) if linear in self.rows else weight

    def outer(self, linear: str, effective: Tensor) -> Tensor:
        """The inverse of the rows' division, for a weight [out, in] seen from outside of the folding."""
        return effective * self.rows[linear].unsqueeze(1) if linear in self.rows else effective

    def full_precision(self) -> Weights:
        """The folded block without any quantization."""
        scaled = {f"{name}.weight": self.inner(name) * scales for name, scales in self.columns.items()}
        return {**self.parameters, **scaled}


def fold(
    weights: Weights,
    linears: Collection[str],
    scaled_groups: Iterable[tuple[ScaleGroup, Tensor, Tensor]],
    store: Callable[[str, Tensor], Tensor],
) -> Folding:
    """Fold (group, scales [in], scales of its producer [out of the producer]) into a block.

    `linears` are the block's quantizable linears; any other producer is a norm. A linear that has more rows
    than there are scales produces the group's input with its last ones. `store` takes a parameter's
    name and value to what will be read back from disk.
    """
    columns: Weights = {}
    rows: Weights = {}
    parameters = dict(weights)
    for group, scales, producer_scales in scaled_groups:
        columns.update(dict.fromkeys(group.linears, scales))
        is_linear = group.previous in linears
        if is_linear:
            num_others = len(weights[f"{group.previous}.weight"]) - len(producer_scales)
            producer_scales = torch.cat([producer_scales.new_ones(num_others), producer_scales])
            rows[group.previous] = producer_scales
        divided = f"{group.previous}.bias" if is_linear else f"{group.previous}.weight"
        if divided in parameters:
            # What a norm multiplies by is offset + weight.
            value = (parameters[divided] + group.norm_offset) / producer_scales - group.norm_offset
            parameters[divided] = store(divided, value)
    return Folding(columns, rows, parameters)
