"""Lay tensors out as the shards of a staged artifact, with one tensor at most in memory.

This module does not know what the tensors are, nor where they come from.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from services.quantizer.tensor_file import StoredTensor, write_tensors

MAX_SHARD_SIZE = 1 << 30


class TensorWriter(Protocol):
    """Whatever takes tensors by name, in an order that means something."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor."""


class ShardFiles(Protocol):
    """Where shards are written: the staging area of an artifact, or what does as it does."""

    def create(self, name: str) -> AbstractContextManager[Any]:
        """Begin a file: something to write bytes to."""

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file."""

    def rename(self, old: str, new: str) -> None:
        """Rename a written file."""


class ShardWriter:
    """Collects tensors in order and writes a shard whenever enough have come together."""

    def __init__(self, staged: ShardFiles, max_shard_size: int = MAX_SHARD_SIZE) -> None:
        self._staged, self._max_shard_size = staged, max_shard_size
        self._pending: dict[str, StoredTensor] = {}
        self._pending_size = 0
        self._shards: list[list[str]] = []
        self._total_size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it stays in memory until its shard is written."""
        self.add_stored(name, StoredTensor.of(tensor.detach().cpu().contiguous()))

    def add_stored(self, name: str, tensor: StoredTensor) -> None:
        """Take a tensor that is read only when its shard is written."""
        if self._pending and self._pending_size + tensor.nbytes > self._max_shard_size:
            self._flush()
        self._pending[name] = tensor
        self._pending_size += tensor.nbytes

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
        with self._staged.create(_part_name(len(self._shards) + 1)) as file:
            self._total_size += write_tensors(file.write, self._pending)
        self._shards.append(sorted(self._pending))
        self._pending, self._pending_size = {}, 0


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"
