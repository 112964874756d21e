"""Rotary tables: the angle of every position, for the scalings that checkpoints of today use.

Knows formulas and positions; does not know a model's configuration file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become angles.

    `kind` is "default", "linear" (positions divided by `factor`) or "llama3" (low frequencies divided by
    `factor`, high ones kept, a ramp between; needs the other three fields).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """fp32 [head_dim / 2]: radians per position of each pair, after scaling."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.kind == "default":
        return frequencies
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind != "llama3":
        raise ValueError(f"rope scaling {config.kind!r} is not supported (default, linear and llama3 are)")
    return _llama3(frequencies, config)


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1's scaling by wavelength: long waves slowed by `factor`, short ones kept, a blend between."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = config.original_max_position / config.high_freq_factor
    shortest_scaled = config.original_max_position / config.low_freq_factor
    ramp = (config.original_max_position / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - ramp) * (frequencies / config.factor) + ramp * frequencies
    scaled = torch.where(wavelengths > shortest_scaled, frequencies / config.factor, blended)
    return torch.where(wavelengths < longest_kept, frequencies, scaled)


def rotary_tables(config: RopeConfig, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), fp32 [num_positions, head_dim / 2]. Computed once, for all batches alike."""
    positions = torch.arange(num_positions, dtype=torch.int64).float()
    angles = torch.outer(positions, inverse_frequencies(config, head_dim))
    return angles.cos(), angles.sin()
