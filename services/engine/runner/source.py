"""Finds what to load: an artifact in its store, verified, or a plain checkpoint directory; and names its
identity.

Knows the artifact volume and file digests. Does not build a model.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from services.engine.models.registry import ARCHITECTURES
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from weft.artifact.checkpoint import Checkpoint, CheckpointError
from weft.artifact.manifest import ArtifactNotFound, Canary, tokenizer_digest
from weft.artifact.regular_file import FileRefusedError, chunks, open_regular
from weft.artifact.store import ArtifactStore


@dataclass(frozen=True, slots=True)
class Source:
    """An opened model directory. `digest` changes whenever its weights or configuration do; `version` is
    empty for a plain checkpoint.
    """

    checkpoint: Checkpoint
    model_name: str
    version: str
    digest: str
    tokenizer_digest: str
    canary: Canary | None
    is_artifact: bool


def open_source(config: RunnerConfig) -> Source:
    """Open what the configuration names. Raises ArtifactError (DigestMismatch, ArtifactNotFound) or
    CheckpointError.
    """
    if config.source is not None:
        return _open_directory(config.source, config.model)
    if config.artifacts is None or config.model is None:
        raise RunnerConfigError("give either source or artifacts and model")
    store = ArtifactStore(config.artifacts)
    artifact = store.open(config.model, config.version)
    store.verify(artifact)
    manifest = artifact.manifest
    return Source(
        checkpoint=Checkpoint.open(artifact.path, ARCHITECTURES),
        model_name=artifact.model,
        version=artifact.version,
        digest=manifest.digest,
        tokenizer_digest=manifest.tokenizer_digest,
        canary=manifest.canary,
        is_artifact=True,
    )


def _open_directory(directory: Path, name: str | None) -> Source:
    checkpoint = Checkpoint.open(directory, ARCHITECTURES)
    try:
        tokenizer = tokenizer_digest(directory)
    except ArtifactNotFound:
        tokenizer = ""  # the engine needs none; a gateway that has one will refuse to pair with it
    plain_name = re.sub(r"[^a-z0-9._-]+", "-", directory.resolve().name.lower()).strip("-._")[:64]
    return Source(
        checkpoint=checkpoint,
        model_name=name or plain_name or "model",
        version="",
        digest=_directory_digest(checkpoint),
        tokenizer_digest=tokenizer,
        canary=None,
        is_artifact=False,
    )


def _directory_digest(checkpoint: Checkpoint) -> str:
    """ "sha256:<hex>" over config.json and the safetensors files: names, sizes and contents."""
    total = hashlib.sha256()
    for path in (checkpoint.directory / "config.json", *checkpoint.files):
        one = hashlib.sha256()
        try:
            with open_regular(path) as (descriptor, identity):
                for chunk in chunks(descriptor):
                    one.update(chunk)
        except (OSError, FileRefusedError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        total.update(f"{path.name} {identity.size} {one.hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"
