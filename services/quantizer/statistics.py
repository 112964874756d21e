"""What the search needs to know of a block's inputs: Gram matrices, means, and some calls to try candidates
on.

This module does not know what is done with any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.quantizer.model_map import ScaleGroup
from services.quantizer.source import Source, Weights

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a module."""


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of the input X [tokens, in] of one scale group: `gram` fp32 [in, in] = X^T X, `mean_abs` fp32 [in]."""

    gram: Tensor
    mean_abs: Tensor


def collect_statistics(
    source: Source, layer: nn.Module, weights: Weights, hidden: Tensor, groups: Sequence[ScaleGroup]
) -> dict[str, InputStatistics]:
    """Of every group's input over `hidden` [windows, length, hidden], under its first linear's name."""
    grams: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    hooks = []
    for group in groups:
        name = group.linears[0]
        num_in = weights[f"{name}.weight"].shape[1]
        grams[name] = torch.zeros(num_in, num_in, device=source.device)
        sums[name] = torch.zeros(num_in, device=source.device)

        def accumulate(_module: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            inputs = arguments[0].flatten(0, 1)
            grams[name].addmm_(inputs.T, inputs)
            sums[name] += inputs.abs().sum(0)

        hooks.append(layer.get_submodule(name).register_forward_pre_hook(accumulate))
    source.run_block(layer, weights, hidden)
    for hook in hooks:
        hook.remove()
    num_tokens = hidden.shape[0] * hidden.shape[1]
    return {name: InputStatistics(gram, sums[name] / num_tokens) for name, gram in grams.items()}


def capture_calls(
    source: Source, layer: nn.Module, weights: Weights, hidden: Tensor, groups: Sequence[ScaleGroup]
) -> dict[str, list[Call]]:
    """Calls of the inspected modules, batch by batch. A linear needs none: its Gram matrix says all."""
    calls: dict[str, list[Call]] = {}
    hooks = []
    for name in {group.inspect for group in groups if group.inspect not in group.linears}:
        calls[name] = []

        def capture(_module: nn.Module, arguments: Any, options: Any, name: str = name) -> None:
            calls[name].append((arguments, options))

        hooks.append(layer.get_submodule(name).register_forward_pre_hook(capture, with_kwargs=True))
    source.run_block(layer, weights, hidden)
    for hook in hooks:
        hook.remove()
    return calls


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """||X W^T||^2 = tr(W H W^T) for `weight` [out, in]."""
    return max(float(((weight @ gram) * weight).sum(dtype=torch.float64)), 0.0)
