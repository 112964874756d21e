"""safetensors files as the quantizer writes them: bytes that follow from names and tensors alone, and tensors
read back one at a time.

Writing the format here instead of through its library lets every byte pass the hashing, syncing and failure
handling of whoever writes. This module does not know what the tensors are, nor which file is to be trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.quantizer.errors import QuantizerError
from weft.artifact.regular_file import FileRefusedError, open_regular, read_exactly
from weft.artifact.safetensors_header import HeaderError, TensorEntry, read_header

NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.int64: "I64", torch.uint8: "U8", torch.int8: "I8",
}  # fmt: skip
"""What the format calls the dtypes that are written."""

_DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is fetched when its bytes are needed: `load` gives it, of this dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """One that is in memory already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Its size as stored."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


def write_tensors(write: Callable[[bytes | memoryview], Any], tensors: Mapping[str, StoredTensor]) -> int:
    """Header and data through `write`, one tensor in memory at a time; the size of the data.

    Widest elements first, then by name: every tensor is aligned to its element size, as readers that map the
    file want.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        data = tensors[name].load().detach().cpu().contiguous()
        if data.dtype != tensors[name].dtype or tuple(data.shape) != tensors[name].shape:
            raise ValueError(f"tensor {name}: {data.dtype} {list(data.shape)} is not what was announced")
        if data.numel():
            write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
        del data
    return offset


class TensorFile:
    """A file that `write_tensors` made. Its header is read at once, tensors when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open_regular(path) as (descriptor, identity):
                self._entries: dict[str, TensorEntry] = read_header(descriptor, identity.size, path)
        except (OSError, FileRefusedError, HeaderError) as error:
            raise QuantizerError(str(error)) from error

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of the file."""
        return frozenset(self._entries)

    def stored(self, name: str) -> StoredTensor:
        """A tensor of the file, not read yet."""
        entry = self._entries[name]
        return StoredTensor(_DTYPES[entry.dtype], entry.shape, lambda: self.load(name))

    def load(self, name: str) -> Tensor:
        """A copy in memory of its own, aligned as torch aligns."""
        entry = self._entries[name]
        try:
            with open_regular(self._path) as (descriptor, _):
                return read_tensor(descriptor, entry, _DTYPES[entry.dtype], self._path)
        except (OSError, FileRefusedError) as error:
            raise QuantizerError(f"{self._path}: tensor {name}: {error}") from error


def read_tensor(descriptor: int, entry: TensorEntry, dtype: torch.dtype, path: Path) -> Tensor:
    """`entry` of an open file. Torch allocates: where memory begins decides which instructions its kernels
    use at the edges, and so, for some, the last bit.
    """
    data = torch.empty(entry.size, dtype=torch.uint8)
    if entry.size:
        read_exactly(descriptor, memoryview(data.numpy()), entry.offset, path)
    return data.view(dtype).reshape(entry.shape)
