"""A quantized linear as tensors of an artifact. Knows the formats; not how the integers were found."""

from __future__ import annotations

import torch
from torch import Tensor

from services.quantizer.config import AWQ, COMPRESSED_TENSORS
from services.quantizer.grid import QuantizedWeight
from weft.artifact.packing import SEQUENTIAL, pack_int4, pack_rows


def packed(weight: QuantizedWeight, file_format: str = AWQ) -> dict[str, Tensor]:
    """The tensors of a linear, by what they add to its name."""
    if file_format == COMPRESSED_TENSORS:
        return {
            "weight_packed": pack_int4(weight.values.cpu(), SEQUENTIAL),
            "weight_zero_point": pack_rows(weight.zeros.cpu()),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.values.shape),
        }
    return {
        "qweight": pack_int4(weight.values.T.cpu()),
        "qzeros": pack_int4(weight.zeros.T.cpu()),
        "scales": weight.scales.T,
    }
