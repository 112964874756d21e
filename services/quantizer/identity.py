"""What a run would make, told by what goes in: so that a run whose artifact is current already can end at
once.

Standard library only, because importing torch takes longer than the whole answer. This module does not know
whether the source is any good; an artifact that matches was made from the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from services.quantizer.companions import companion_files
from services.quantizer.config import QuantizerConfig, split_weight
from services.quantizer.errors import QuantizerError
from services.quantizer.gate import require
from services.quantizer.texts import BUNDLED_CALIBRATION, BUNDLED_EVALUATION, read_texts
from weft import logs
from weft.artifact.manifest import ArtifactError, DigestMismatch, Manifest
from weft.artifact.regular_file import FileRefusedError, chunks, open_regular
from weft.artifact.store import Artifact, ArtifactStore
from weft.strict_json import canonical_bytes

_LOGGER = logs.get_logger("quantizer")
_IDENTITY = ("source_digest", "recipe", "seed", "calibration_digest", "tokenizer_digest")


def draft_manifest(config: QuantizerConfig) -> Manifest:
    """The manifest of a run as far as it is known beforehand: no files, errors, quality or canary."""
    _, calibration_digest = read_texts(
        [split_weight(p)[0] for p in config.calibration] or BUNDLED_CALIBRATION
    )
    _, evaluation_digest = read_texts(config.evaluation or BUNDLED_EVALUATION)
    check_directory(config.source)
    companions = companion_files(config.source)
    return Manifest(
        model=config.name,
        files={},
        source_digest=source_digest(config.source, companions),
        recipe=config.recipe(evaluation_digest),
        seed=config.seed,
        calibration_digest=calibration_digest,
        tokenizer_digest="sha256:" + hashlib.sha256(companions["tokenizer.json"]).hexdigest(),
    )


def draft_key(draft: Manifest) -> str:
    """What a run makes, as a digest in hex: the same for two runs for which one artifact is current."""
    document = {name: getattr(draft, name) for name in _IDENTITY}
    return hashlib.sha256(canonical_bytes({**document, "seed": str(draft.seed)})).hexdigest()


def find_current(config: QuantizerConfig, draft: Manifest) -> Artifact | None:
    """The CURRENT artifact, if it is what the run would make and still whole. Raises GateMissed when it is,
    but worse than `config` allows.
    """
    artifact = find_same(config.artifacts, draft)
    if artifact is not None:
        require(config, artifact)
    return artifact


def find_same(artifacts: Path, draft: Manifest) -> Artifact | None:
    """The CURRENT artifact of the model, if it was made of what `draft` says and is still whole."""
    store = ArtifactStore(artifacts)
    try:
        artifact = store.open(draft.model)
        if any(getattr(artifact.manifest, key) != getattr(draft, key) for key in _IDENTITY):
            return None
        store.verify(artifact)
    except DigestMismatch as error:
        _LOGGER.warning("the current artifact is damaged", model=draft.model, reason=str(error))
        return None
    except ArtifactError:
        return None
    return artifact


def check_directory(source: Path) -> None:
    """Refuse what is no checkpoint at all, with a hint. Raises QuantizerError."""
    if not source.is_dir():
        raise QuantizerError(f"{source}: no such directory")
    if not os.path.lexists(source / "config.json"):
        snapshots = source / "snapshots"
        hint = f"; give one of the directories in {snapshots}" if snapshots.is_dir() else ""
        raise QuantizerError(f"{source / 'config.json'}: missing, so this is no checkpoint{hint}")


def source_digest(directory: Path, companions: dict[str, bytes]) -> str:
    """ "sha256:<hex>" over configuration, index, weights and companions."""
    hasher = hashlib.sha256()
    for name in sorted(companions):
        hasher.update(f"{name} {hashlib.sha256(companions[name]).hexdigest()}\n".encode())
    paths = [*directory.glob("config.json"), *directory.glob("*.safetensors*")]
    for path in sorted(paths):
        hasher.update(f"{path.name} {_digest(path)}\n".encode("utf-8", "surrogateescape"))
    return "sha256:" + hasher.hexdigest()


def _digest(path: Path) -> str:
    hasher = hashlib.sha256()
    try:
        with open_regular(path) as (descriptor, _):
            for chunk in chunks(descriptor):
                hasher.update(chunk)
    except (OSError, FileRefusedError) as error:
        raise QuantizerError(str(error)) from error
    return hasher.hexdigest()
