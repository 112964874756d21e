"""A safe reader of a Hugging Face checkpoint directory, shared by the quantizer and the engine.

Reads config.json and safetensors, nothing else: no pickle, no code from the directory, no name that leaves
it, no link. Tensors are copied out with pread, so a file that shrinks later cannot take the process down as a
live mapping would. This module does not know any architecture: which names and shapes a model needs is the
caller's affair.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from weft import logs
from weft.artifact.regular_file import (
    FileIdentity,
    FileRefusedError,
    identify,
    open_regular,
    read_exactly,
    read_regular,
)
from weft.artifact.safetensors_header import HeaderError, TensorEntry, read_header
from weft.strict_json import StrictJsonError, parse_object

_LOGGER = logs.get_logger("checkpoint")

MAX_CONFIG_SIZE = 4 << 20
MAX_INDEX_SIZE = 64 << 20
MAX_SHARDS = 4096

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\.safetensors\Z")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64,
}  # fmt: skip


class CheckpointError(ValueError):
    """The directory cannot be read as a checkpoint; the message names the file, and the tensor if there is
    one.
    """


class ReadableCheckpoint(Protocol):
    """What reads like an opened checkpoint; `Checkpoint` says what the parts mean."""

    directory: Path
    config: dict[str, Any]
    names: frozenset[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Dimensions of a tensor."""

    def dtype(self, name: str) -> str:
        """The dtype as safetensors calls it."""

    def load(self, name: str) -> Tensor:
        """A copy of the tensor."""


class Checkpoint:
    """An opened checkpoint: headers read and validated, tensors loaded on demand.

    Attributes:
        directory: where it lies.
        config: config.json as parsed.
        names: every tensor it holds.
    """

    def __init__(
        self, directory: Path, config: dict[str, Any], located: dict[str, tuple[Path, TensorEntry]]
    ) -> None:
        self.directory = directory
        self.config = config
        self.names = frozenset(located)
        self._located = located
        self._identities: dict[Path, FileIdentity] = {}

    @classmethod
    def open(cls, directory: Path, implemented: Collection[str] = ()) -> Checkpoint:
        """Read config.json, the index (or the single file) and all headers. Raises CheckpointError.

        `implemented`: architectures that the caller computes itself, so that what their configuration says
        about code of its own is left out instead of refused.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        config = read_config(directory, implemented)
        headers: dict[Path, dict[str, TensorEntry]] = {}
        identities: dict[Path, FileIdentity] = {}
        weight_map = _read_weight_map(directory)
        for path in sorted({directory / shard for shard in weight_map.values()} or {directory / _SINGLE}):
            headers[path], identities[path] = _read_shard_header(path)
        checkpoint = cls(directory, config, _locate(directory, weight_map, headers))
        checkpoint._identities = identities
        return checkpoint

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted(self._identities))

    def shape(self, name: str) -> tuple[int, ...]:
        """Dimensions of a tensor."""
        return self._find(name)[1].shape

    def dtype(self, name: str) -> str:
        """The dtype as safetensors calls it: "BF16", "F16", "I32" and so on."""
        return self._find(name)[1].dtype

    def load(self, name: str) -> Tensor:
        """A copy of the tensor in its stored dtype, on the CPU; its memory is its own."""
        path, entry = self._find(name)
        # Torch allocates: where memory begins decides which instructions some of its kernels use at the
        # edges, and so the last bit.
        data = torch.empty(entry.size, dtype=torch.uint8)
        try:
            with open_regular(path) as (descriptor, identity):
                if identity != self._identities[path]:
                    raise CheckpointError(f"{path}: changed since it was opened (tensor {name})")
                if entry.size:
                    read_exactly(descriptor, memoryview(data.numpy()), entry.offset, path)
                if identify(descriptor, path) != identity:
                    raise CheckpointError(f"{path}: changed while it was read (tensor {name})")
        except (OSError, FileRefusedError) as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error
        return data.view(_TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

    def _find(self, name: str) -> tuple[Path, TensorEntry]:
        try:
            return self._located[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor {name}") from None


def read_config(directory: Path, implemented: Collection[str] = ()) -> dict[str, Any]:
    """config.json as a strict JSON object. One that asks for code of its own is refused, or loses that wish
    if its only architecture is among `implemented`.
    """
    path = directory / "config.json"
    try:
        config = parse_object(read_regular(path, MAX_CONFIG_SIZE), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, FileRefusedError, StrictJsonError) as error:
        raise CheckpointError(str(error)) from error
    architectures = config.get("architectures")
    if config.get("auto_map") and architectures in [[name] for name in implemented]:
        del config["auto_map"]
        _LOGGER.info("the model's own code is not run", path=str(path), architectures=architectures)
    for key in ("auto_map", "trust_remote_code"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} asks to run code of the model; it never is")
    return config


def _read_weight_map(directory: Path) -> dict[str, str]:
    """The index's tensor -> file map; empty when the checkpoint is a single file."""
    path = directory / _INDEX
    if (directory / _SINGLE).exists() or (directory / _SINGLE).is_symlink():
        return {}
    try:
        index = parse_object(read_regular(path, MAX_INDEX_SIZE), str(path))
    except FileNotFoundError:
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{directory}: only pickled weights ({pickles[0]}), which are never read"
            ) from None
        raise CheckpointError(f"{directory}: neither {_SINGLE} nor {_INDEX}") from None
    except (OSError, FileRefusedError, StrictJsonError) as error:
        raise CheckpointError(str(error)) from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.match(shard) or ".." in shard:
            raise CheckpointError(
                f"{path}: tensor {name[:80]!r} lies in {str(shard)[:80]!r}, not a shard's name"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CheckpointError(f"{path}: more than {MAX_SHARDS} shards")
    return weight_map


def _read_shard_header(path: Path) -> tuple[dict[str, TensorEntry], FileIdentity]:
    try:
        with open_regular(path) as (descriptor, identity):
            return read_header(descriptor, identity.size, path), identity
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, FileRefusedError, HeaderError) as error:
        raise CheckpointError(str(error)) from error


def _locate(
    directory: Path, weight_map: dict[str, str], headers: dict[Path, dict[str, TensorEntry]]
) -> dict[str, tuple[Path, TensorEntry]]:
    located: dict[str, tuple[Path, TensorEntry]] = {}
    for path, entries in headers.items():
        for name, entry in entries.items():
            if name in located:
                raise CheckpointError(f"{path}: tensor {name} is also in {located[name][0].name}")
            located[name] = (path, entry)
    for name, shard in weight_map.items():
        if name not in located or located[name][0] != directory / shard:
            raise CheckpointError(
                f"{directory / shard}: tensor {name[:80]} is missing, though the index places it there"
            )
    return located
