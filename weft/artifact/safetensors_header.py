"""The header of a safetensors file, validated more narrowly than the format's own library does.

The library lets pass duplicate names, names that are paths, blanks before the JSON and shapes whose sizes
overflow; a reader that keeps another of two equal names would load other weights than were checked. This
module knows neither torch nor what the tensors are for.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from weft.artifact.regular_file import read_exactly
from weft.strict_json import parse_object

MAX_HEADER_SIZE = 16 << 20
MAX_TENSORS = 100_000
MAX_RANK = 8
MAX_DIMENSION = 1 << 40

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
"""Bytes per element of every dtype that is read; others are refused."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,255}\Z")
_IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (a pickled checkpoint?); only safetensors are read"),
    (b"GGUF", "a GGUF file; only safetensors are read"),
    (b"\x80\x02", "a pickle; only safetensors are read"),
    (b"\x80\x03", "a pickle; only safetensors are read"),
    (b"\x80\x04", "a pickle; only safetensors are read"),
    (b"\x80\x05", "a pickle; only safetensors are read"),
)


class HeaderError(ValueError):
    """The file is no safetensors file that can be trusted; the message names file and tensor."""


class TensorEntry(NamedTuple):
    """Where a tensor lies: `offset` and `size` in bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(descriptor: int, file_size: int, path: Path) -> dict[str, TensorEntry]:
    """Read and validate the header of an open safetensors file of `file_size` bytes."""
    head = bytearray(min(24, file_size))
    read_exactly(descriptor, memoryview(head), 0, path)
    for magic, meaning in _IMPOSTORS:
        if head.startswith(magic):
            raise HeaderError(f"{path}: {meaning}")
    if file_size < 8:
        raise HeaderError(f"{path}: {file_size} bytes are no safetensors file")
    length = int.from_bytes(head[:8], "little")
    if length < 2 or length > MAX_HEADER_SIZE:
        raise HeaderError(f"{path}: header of {length} bytes; 2 to {MAX_HEADER_SIZE} are accepted")
    if length > file_size - 8:
        raise HeaderError(f"{path}: truncated inside its header ({file_size} bytes)")
    raw = bytearray(length)
    read_exactly(descriptor, memoryview(raw), 8, path)
    if not raw.startswith(b"{"):
        raise HeaderError(f"{path}: the header does not begin with an object")
    if not raw.rstrip(b" ").endswith(b"}"):
        raise HeaderError(f"{path}: the header goes on after its object")
    try:
        document = parse_object(bytes(raw), f"{path}: header")
    except ValueError as error:
        raise HeaderError(str(error)) from None
    return _entries(document, 8 + length, file_size, path)


def _entries(document: dict[str, Any], data_start: int, file_size: int, path: Path) -> dict[str, TensorEntry]:
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{path}: __metadata__ must map strings to strings")
    if len(document) > MAX_TENSORS:
        raise HeaderError(f"{path}: {len(document)} tensors; at most {MAX_TENSORS} are accepted")
    entries = {name: _entry(name, value, data_start, path) for name, value in document.items()}
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            kind = "overlaps another tensor" if entry.offset < end else "follows a hole"
            raise HeaderError(f"{path}: tensor {name} {kind}")
        end += entry.size
    if end != file_size:
        kind = "truncated: " if end > file_size else "bytes after the last tensor: "
        raise HeaderError(f"{path}: {kind}{file_size} bytes, its header describes {end}")
    return entries


def _entry(name: str, value: Any, data_start: int, path: Path) -> TensorEntry:
    if not is_tensor_name(name):
        raise HeaderError(f"{path}: {name[:80]!r} is not a name for a tensor")
    where = f"{path}: tensor {name}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{where}: dtype, shape and data_offsets are expected, nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise HeaderError(f"{where}: dtype {str(dtype)[:32]} is not supported")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_RANK
        or not all(_is_count(n, MAX_DIMENSION) for n in shape)
    ):
        raise HeaderError(f"{where}: shape {str(shape)[:80]} is not a shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n, 1 << 62) for n in offsets):
        raise HeaderError(f"{where}: data_offsets {str(offsets)[:80]} are not two offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise HeaderError(f"{where}: {end - begin} bytes do not hold {dtype} {shape}")
    return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)


def is_tensor_name(name: str) -> bool:
    """Letters, digits, underscore, dot and hyphen, at most 256, and no `..`: nothing that could become a
    path.
    """
    return _NAME.match(name) is not None and ".." not in name


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit
