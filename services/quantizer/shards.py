"""Write tensors as safetensors shards into a staged artifact, holding one shard at most in memory.

Writing the format here instead of through its library lets every byte pass the staging area's hashing,
syncing and failure handling. This module does not know what the tensors are.
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from weft.artifact.publish import Staging

MAX_SHARD_SIZE = 1 << 30

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


class ShardWriter:
    """Collects tensors in order and writes a shard whenever enough have come together."""

    def __init__(self, staged: Staging, max_shard_size: int = MAX_SHARD_SIZE) -> None:
        self._staged, self._max_shard_size = staged, max_shard_size
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total_size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is written with its shard."""
        tensor = tensor.detach().cpu().contiguous()
        if self._pending and _size(self._pending) + tensor.nbytes > self._max_shard_size:
            self._flush()
        self._pending[name] = tensor

    def finish(self) -> None:
        """Write what is left, give the shards their final names, and write the index."""
        self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._staged.rename(_part_name(number), final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_size}, "weight_map": weight_map}
        self._staged.write(
            "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True).encode() + b"\n"
        )

    def _flush(self) -> None:
        if not self._pending:
            return
        # Widest first, then by name: every tensor is aligned to its element size, as readers that map the
        # file want.
        names = sorted(self._pending, key=lambda name: (-self._pending[name].element_size(), name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            tensor = self._pending[name]
            span = [offset, offset + math.prod(tensor.shape) * tensor.element_size()]
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
            offset = span[1]
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with self._staged.create(_part_name(len(self._shards) + 1)) as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names:
                file.write(memoryview(self._pending[name].reshape(-1).view(torch.uint8).numpy()))
        self._shards.append(sorted(self._pending))
        self._total_size += offset
        self._pending = {}


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"
