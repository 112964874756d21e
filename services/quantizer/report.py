"""The report of a run as a document: what an artifact is, how good, and what was decided. No clock times,
no host: equal runs, equal bytes.

Knows the manifest's words and what the parts of a run tell; nothing of how the numbers arose, nor how they
are shown (report_page.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from services.quantizer.source import STORED_DTYPES, Source
from weft.artifact.manifest import FileEntry, LinearError


def build_report(
    model: str,
    recipe: dict[str, Any],
    quality: dict[str, Any] | None,
    errors: Mapping[str, LinearError],
    choices: Mapping[str, str],
    full_precision: Sequence[str],
    *,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    texts: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    missed: Sequence[str] = (),
) -> dict[str, Any]:
    """`records` tell of linears what else there is to tell, `choices` maps scale groups to the candidate
    taken, `full_precision` names the linears that were left as they are, `missed` says which bounds of the
    gate the artifact did not keep.
    """
    linears: dict[str, dict[str, Any]] = {
        name: {"rounding": error.rounding, "chosen": error.chosen} for name, error in errors.items()
    }
    for name, record in (records or {}).items():
        linears[name] = {**record, **linears.get(name, {})}
    return {
        "model": model,
        "recipe": recipe,
        "quality": quality,
        "linears": linears,
        "scales": dict(choices),
        "full_precision": list(full_precision),
        "texts": dict(texts or {}),
        "sizes": dict(sizes or {}),
        "missed": list(missed),
    }


def measure_sizes(source: Source, files: Mapping[str, FileEntry], group_size: int) -> dict[str, Any]:
    """Bytes of the weights before and after, from the headers; `files` are the artifact's."""
    checkpoint = source.checkpoint
    counts = {name: math.prod(checkpoint.shape(name)) for name in checkpoint.names}
    before = sum(
        count * STORED_DTYPES[checkpoint.dtype(name)].itemsize
        for name, count in counts.items()
        if checkpoint.dtype(name) in STORED_DTYPES
    )
    after = sum(entry.size for name, entry in files.items() if name.endswith(".safetensors"))
    parameters = sum(counts.values())
    return {
        "parameters": parameters,
        "source_bytes": before,
        "artifact_bytes": after,
        "bits_per_parameter": round(8 * after / max(1, parameters), 4),
        # Four bits, and a 16-bit scale and a 4-bit zero point for each group.
        "bits_per_quantized_weight": round(4 + 20 / group_size, 4),
    }


def report_json(report: dict[str, Any]) -> bytes:
    """Indented, in key order; lists of numbers on one line."""
    return (_dump(report, 0) + "\n").encode("ascii")


def _dump(value: Any, depth: int) -> str:
    """As json.dumps(indent=1, sort_keys=True), but a list of numbers, like a histogram, is one line."""
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, Mapping) and value:
        items = (f"{json.dumps(str(key))}: {_dump(value[key], depth + 1)}" for key in sorted(value))
        return "{" + inner + f",{inner}".join(items) + outer + "}"
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        return "[" + inner + f",{inner}".join(_dump(item, depth + 1) for item in value) + outer + "]"
    return json.dumps(value, sort_keys=True)
