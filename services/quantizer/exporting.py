"""`python -m services.quantizer export ...`: the weights of an artifact in another format, as a plain
directory for other programs.

The integers, zero points and scales stay what they are; only their packing changes. What comes out is no
artifact: it has no manifest, and nobody verifies it. Appears whole or not at all.
"""

# ruff: noqa: RUF009 - `option` makes a dataclass field

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.quantizer.config import COMPRESSED_TENSORS, ENV_PREFIX, FORMATS
from services.quantizer.errors import QuantizerError
from weft import config as weft_config
from weft import logs
from weft.artifact.manifest import ArtifactError, is_model_name
from weft.artifact.store import Artifact, ArtifactStore
from weft.config import REQUIRED, ConfigError, option


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Flags of `export`."""

    artifacts: Path = option(REQUIRED, "root of the artifact volume", metavar="DIR")
    name: str = option(REQUIRED, "model to export")
    version: str | None = option(None, "version of it; by default the current one")
    out: Path = option(REQUIRED, "directory to make; it must not exist", metavar="DIR")
    format: str = option(COMPRESSED_TENSORS, "how to store the weights", choices=FORMATS)

    def __post_init__(self) -> None:
        for flag, name in (("--name", self.name), ("--version", self.version or "current")):
            if not is_model_name(name):
                raise ConfigError(flag, f"{name[:80]!r} does not match [a-z0-9][a-z0-9._-]{{0,63}}")
        if self.format not in FORMATS:
            raise ConfigError("--format", f"{self.format[:80]!r} is none of {', '.join(FORMATS)}")


def main(flags: Sequence[str], prog: str) -> int:
    """Exit status: 0 exported, 1 failed, 2 wrong usage (as SystemExit)."""
    weft_config.let_waiting_threads_sleep()
    config = weft_config.load_config(
        ExportConfig, flags, prog=prog, env_prefix=ENV_PREFIX, description="An artifact in another format."
    )
    logs.start()
    from weft.artifact.checkpoint import CheckpointError  # it needs torch, which takes seconds

    try:
        export(config)
    except (QuantizerError, ArtifactError, CheckpointError, OSError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {logs.escape(text[:500])}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        logs.stop()
    print(config.out)
    return 0


def export(config: ExportConfig) -> None:
    """Verify the artifact, and write it to `config.out` in `config.format`. Raises QuantizerError, and what
    weft.artifact raises.
    """
    store = ArtifactStore(config.artifacts)
    artifact = store.open(config.name, config.version)
    store.verify(artifact)
    if os.path.lexists(config.out):
        raise QuantizerError(f"--out: {config.out} exists already")
    with _NewDirectory(config.out) as made:
        _write(artifact, made, config.format)
        made.finish()


def _write(artifact: Artifact, made: _NewDirectory, file_format: str) -> None:
    from services.quantizer.companions import COMPANION_NAMES, quantized_config
    from services.quantizer.importing.view import PackedCheckpoint
    from services.quantizer.packed_linear import packed
    from services.quantizer.shards import ShardWriter

    checkpoint = PackedCheckpoint.open(artifact.path)
    writer = ShardWriter(made)
    for name in sorted(checkpoint.names):
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in checkpoint.linears:
            for suffix, tensor in packed(checkpoint.quantized(linear), file_format).items():
                writer.add(f"{linear}.{suffix}", tensor)
        else:
            writer.add(name, checkpoint.load(name))
    writer.finish()
    skipped, size = list(checkpoint.scheme.full_precision), checkpoint.group_size
    made.write("config.json", quantized_config(checkpoint.config, size, skipped, file_format))
    for name in COMPANION_NAMES:
        if name in artifact.manifest.files:
            made.write(name, (artifact.path / name).read_bytes())


class _NewDirectory:
    """Files beside `path` under another name until `finish`. Without it nothing stays."""

    def __init__(self, path: Path) -> None:
        self._final = path
        self._path = path.parent / f".{path.name}.tmp-{secrets.token_hex(8)}"

    def __enter__(self) -> _NewDirectory:
        self._path.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Begin a file; it is synced when it is closed."""
        with open(self._path / name, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file."""
        with self.create(name) as file:
            file.write(data)

    def rename(self, old: str, new: str) -> None:
        """Rename a written file."""
        os.rename(self._path / old, self._path / new)

    def finish(self) -> None:
        """Make the directory appear."""
        os.rename(self._path, self._final)
