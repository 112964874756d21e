"""A finished block as tensors of the artifact. Knows the layout on disk; not how the integers were found."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from services.quantizer.config import AWQ
from services.quantizer.grid import QuantizedWeight
from services.quantizer.packed_linear import packed
from services.quantizer.quantize import QuantizedBlock
from services.quantizer.shards import TensorWriter
from services.quantizer.source import STORED_DTYPES, Source
from weft.artifact.manifest import LinearError


def write_block(
    writer: TensorWriter, source: Source, index: int, block: QuantizedBlock, file_format: str = AWQ
) -> None:
    """Add all tensors of block `index` to `writer`, by the names that the source has for them; linears as
    `file_format` says, one of config.py's FORMATS.
    """
    for full_name, names in sorted(source.stored_parameters(index).items()):
        linears = [name.removesuffix(".weight") for name in names]
        if linears[0] in block.linears:
            weight = joined(source, [block.linears[linear] for linear in linears])
            for suffix, tensor in packed(weight, file_format).items():
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


def joined_errors(source: Source, index: int, errors: Mapping[str, LinearError]) -> dict[str, LinearError]:
    """By full name; of linears that one tensor of the source holds, the mean.

    Each is relative to what its own linear puts out, so where every part is at or below rounding, so is the
    mean.
    """
    parts: dict[str, list[LinearError]] = {}
    for name, error in errors.items():
        parts.setdefault(source.full_name(index, name), []).append(error)
    return {
        name: LinearError(fmean(error.rounding for error in found), fmean(error.chosen for error in found))
        for name, found in parts.items()
    }
