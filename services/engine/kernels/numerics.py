"""How and where results are computed: the choices that decide a row's bits.

Knows the choices; which of them hold on a machine is found out by `services.engine.runner.self_test`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CPU = torch.device("cpu")
KEY_TILE = 128
"""Keys per attention tile. Tiles begin at absolute multiples of it, whatever the KV block size."""


@dataclass(frozen=True, slots=True)
class Numerics:
    """The choices one engine makes for its whole life.

    Attributes:
        dtype: of weights and activations.
        is_deterministic: whether a row's logits must be bit-equal in every batch.
        row_tile: linears see a multiple of this many rows. torch's matmul takes other kernels, with other
            rounding, below a few rows; from this multiple on it does not.
        query_tile: the same for the (query, head) rows of attention.
        device: where weights and activations live.
    """

    dtype: torch.dtype
    is_deterministic: bool
    row_tile: int = 16
    query_tile: int = 4
    device: torch.device = CPU


def pad_rows(x: Tensor, tile: int) -> Tensor:
    """x [rows, width] with zero rows added up to a multiple of `tile`."""
    missing = -x.shape[0] % tile
    return F.pad(x, (0, 0, 0, missing)) if missing else x
