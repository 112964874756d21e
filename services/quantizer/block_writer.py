"""A finished block as tensors of the artifact. Knows the layout on disk; not how the integers were found."""

from __future__ import annotations

from torch import Tensor

from services.quantizer.grid import QuantizedWeight
from services.quantizer.quantize import QuantizedBlock
from services.quantizer.shards import ShardWriter
from services.quantizer.source import STORED_DTYPES, Source
from weft.artifact.packing import pack_int4


def write_block(writer: ShardWriter, source: Source, index: int, block: QuantizedBlock) -> None:
    """Add all tensors of block `index` to `writer`, by name."""
    for name in sorted(block.weights):
        linear = name.removesuffix(".weight")
        full_name = source.full_name(index, name)
        if name.endswith(".weight") and linear in block.linears:
            for suffix, tensor in packed(block.linears[linear]).items():
                writer.add(f"{full_name.removesuffix('weight')}{suffix}", tensor)
        else:
            writer.add(full_name, block.weights[name].to(STORED_DTYPES[source.checkpoint.dtype(full_name)]))


def packed(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The three tensors of the gemm layout: input channels along rows."""
    return {
        "qweight": pack_int4(weight.values.T.cpu()),
        "qzeros": pack_int4(weight.zeros.T.cpu()),
        "scales": weight.scales.T,
    }
