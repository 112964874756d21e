"""A finished block as tensors of the artifact. Knows the layout on disk; not how the integers were found."""

from __future__ import annotations

from torch import Tensor

from services.quantizer.grid import QuantizedWeight
from services.quantizer.quantize import QuantizedBlock
from services.quantizer.shards import TensorWriter
from services.quantizer.source import STORED_DTYPES, Source
from weft.artifact.packing import pack_int4


def write_block(writer: TensorWriter, source: Source, index: int, block: QuantizedBlock) -> None:
    """Add all tensors of block `index` to `writer`, by the names that the source has for them."""
    for full_name, names in sorted(source.stored_parameters(index).items()):
        linears = [name.removesuffix(".weight") for name in names]
        if linears[0] in block.linears:
            weight = joined(source, [block.linears[linear] for linear in linears])
            for suffix, tensor in packed(weight).items():
                writer.add(f"{full_name.removesuffix('weight')}{suffix}", tensor)
        else:
            tensor = source.join_rows([block.weights[name] for name in names])
            writer.add(full_name, tensor.to(STORED_DTYPES[source.checkpoint.dtype(full_name)]))


def joined(source: Source, parts: list[QuantizedWeight]) -> QuantizedWeight:
    """The linears that one tensor of the source holds, as one: rows are quantized independently."""
    return QuantizedWeight(
        *(
            source.join_rows([getattr(part, field) for part in parts])
            for field in ("values", "zeros", "scales")
        )
    )


def packed(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The three tensors of the gemm layout: input channels along rows."""
    return {
        "qweight": pack_int4(weight.values.T.cpu()),
        "qzeros": pack_int4(weight.zeros.T.cpu()),
        "scales": weight.scales.T,
    }
