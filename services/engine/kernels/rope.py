"""Rotary tables: the angle of every position, for the scalings that checkpoints of today use.

Knows formulas and positions; does not know a model's configuration file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become angles.

    `kind` is "default", "linear" (positions divided by `factor`), "llama3" (low frequencies divided by
    `factor`, high ones kept, a ramp between; needs the three fields after it) or "longrope" (each frequency
    divided by its own factor, one list for contexts up to `original_max_position` and one for longer ones;
    arXiv 2402.13753). `rotary_dim`: values of a head that turn, None for all. `attention_factor`: what sines
    and cosines are multiplied by.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    rotary_dim: int | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0


def inverse_frequencies(config: RopeConfig, head_dim: int, num_positions: int = 0) -> Tensor:
    """fp32 [rotary_dim / 2]: radians per position of each pair, after scaling.

    "longrope" takes the one list for every position, by whether there are more than `original_max_position`
    of them: a key in the cache was turned once and for all, and a choice by how long the text has become
    would want it turned again.
    """
    turned = config.rotary_dim or head_dim
    exponents = torch.arange(0, turned, 2, dtype=torch.int64).float() / turned
    frequencies = 1.0 / (config.theta**exponents)
    if config.kind == "default":
        return frequencies
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "longrope":
        is_long = num_positions > config.original_max_position
        factors = torch.tensor(config.long_factors if is_long else config.short_factors)
        return 1.0 / (factors * config.theta**exponents)
    if config.kind != "llama3":
        raise ValueError(
            f"rope scaling {config.kind!r} is not supported (default, linear, llama3 and longrope are)"
        )
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
    """(cos, sin), fp32 [num_positions, head_dim / 2]. Computed once, for all batches alike.

    Pairs beyond `rotary_dim` / 2 stand still.
    """
    positions = torch.arange(num_positions, dtype=torch.int64).float()
    angles = torch.outer(positions, inverse_frequencies(config, head_dim, num_positions))
    cos, sin = angles.cos() * config.attention_factor, angles.sin() * config.attention_factor
    still = head_dim // 2 - cos.shape[1]
    return F.pad(cos, (0, still), value=1.0), F.pad(sin, (0, still))


def pairs_apart(head_dim: int, rotary_dim: int) -> list[int]:
    """Which value of a head goes to each place, so that the pairs (i, i + rotary_dim / 2) of its first
    `rotary_dim` values become pairs (i, i + head_dim / 2), and those that stand still fill up both halves.
    """
    half, still = rotary_dim // 2, (head_dim - rotary_dim) // 2
    first_still = list(range(rotary_dim, rotary_dim + still))
    second_still = list(range(rotary_dim + still, head_dim))
    return [*range(half), *first_still, *range(half, rotary_dim), *second_still]
