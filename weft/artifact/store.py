"""The artifact volume: find, verify and publish artifacts. Standard library only.

    <root>/<model>/<version>/manifest.json and the files it lists; run.json is outside of the manifest
    <root>/<model>/CURRENT                 one line, the version to serve

A reader sees a whole artifact or none: `publish` (in publish.py) writes beside and renames. This module does
not know what the files hold.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weft.artifact.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_SIZE,
    ArtifactError,
    ArtifactNotFound,
    DigestMismatch,
    Manifest,
    is_model_name,
)
from weft.artifact.regular_file import FileRefusedError, chunks, open_regular, read_regular

if TYPE_CHECKING:
    from weft.artifact.publish import Staging

CURRENT_NAME = "CURRENT"
RUN_NAME = "run.json"
_MAX_CURRENT_SIZE = 256


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published artifact: its directory, its manifest, and the names it was found under."""

    path: Path
    manifest: Manifest
    model: str
    version: str


class ArtifactStore:
    """The artifacts below one directory. Cheap to make; holds no state but `root`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def models(self) -> list[str]:
        """Models that have a CURRENT version, sorted."""
        try:
            names = sorted(os.listdir(self.root))
        except FileNotFoundError:
            return []
        return [name for name in names if is_model_name(name) and (self.root / name / CURRENT_NAME).is_file()]

    def versions(self, model: str) -> list[str]:
        """Directories of `model` that hold a manifest, sorted by name. The manifest may be broken."""
        parent = self.model_directory(model)
        try:
            names = sorted(os.listdir(parent))
        except FileNotFoundError:
            return []
        return [
            name
            for name in names
            if is_model_name(name)
            and not (parent / name).is_symlink()
            and (parent / name / MANIFEST_NAME).is_file()
        ]

    def current(self, model: str) -> str:
        """The version that CURRENT names. ArtifactNotFound when the model has none."""
        path = self.model_directory(model) / CURRENT_NAME
        try:
            line = read_regular(path, _MAX_CURRENT_SIZE)
        except FileNotFoundError:
            raise ArtifactNotFound(f"model {model}: nothing published in {self.root}") from None
        except (OSError, FileRefusedError) as error:
            raise ArtifactError(str(error)) from error
        version = line.decode("ascii", "replace").removesuffix("\n")
        if not is_model_name(version):
            raise ArtifactError(f"{path}: {version[:80]!r} is not the name of a version")
        return version

    def open(self, model: str, version: str | None = None) -> Artifact:
        """The artifact of `version`, or of CURRENT. Reads its manifest; `verify` checks the other files."""
        version = self.current(model) if version is None else version
        if not is_model_name(version):
            raise ArtifactNotFound(f"model {model}: {version[:80]!r} is not the name of a version")
        path = self.model_directory(model) / version
        if path.is_symlink() or not path.is_dir():
            raise ArtifactNotFound(f"model {model}: no version {version} in {self.root}")
        manifest = read_manifest(path)
        if manifest.model != model:
            raise ArtifactError(f"{path}: its manifest is of model {manifest.model}")
        return Artifact(path, manifest, model, version)

    def hold(self, model: str, version: str) -> int | None:
        """Say that a version is in use, until the descriptor that is returned is closed: nobody removes it.
        None when it cannot be said: the volume knows no locks, or the version is being removed.
        """
        path = self.model_directory(model) / version
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def verify(self, artifact: Artifact, names: Iterable[str] | None = None) -> None:
        """Check size and sha256 of `names`, or of every file and that there is no other. Raises
        DigestMismatch.
        """
        files = artifact.manifest.files
        for name in sorted(files) if names is None else names:
            if name not in files:
                raise ArtifactNotFound(f"{artifact.path / name}: not in the manifest")
            _verify_file(artifact.path / name, name, files[name].sha256, files[name].size)
        if names is None:
            extra = sorted(set(os.listdir(artifact.path)) - set(files) - {MANIFEST_NAME, RUN_NAME})
            if extra:
                raise DigestMismatch(extra[0][:128], "no such file", "a file that the manifest does not list")

    def read(self, artifact: Artifact, name: str, max_size: int = 256 << 20) -> bytes:
        """The verified bytes of one file of the manifest: for tokenizer, templates and configuration."""
        entry = artifact.manifest.files.get(name)
        if entry is None:
            raise ArtifactNotFound(f"{artifact.path / name}: not in the manifest")
        try:
            data = read_regular(artifact.path / name, max_size)
        except FileNotFoundError:
            raise DigestMismatch(name, f"sha256:{entry.sha256}", "no file") from None
        except (OSError, FileRefusedError) as error:
            raise ArtifactError(str(error)) from error
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            raise DigestMismatch(name, f"sha256:{entry.sha256}", f"sha256:{found}")
        return data

    def stage(self, model: str) -> Staging:
        """A place to write a new artifact of `model`; see `publish.Staging`."""
        from weft.artifact.publish import Staging  # only writers pay for it, and it imports this module

        return Staging(self, model)

    def model_directory(self, model: str) -> Path:
        """Where versions of `model` lie. ArtifactNotFound when the name could never be one."""
        if not is_model_name(model):
            raise ArtifactNotFound(f"{model[:80]!r} is not the name of a model ([a-z0-9][a-z0-9._-]{{0,63}})")
        return self.root / model


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artifact's directory. ArtifactNotFound when it has none (so it is no artifact)."""
    try:
        return Manifest.parse(read_regular(directory / MANIFEST_NAME, MAX_MANIFEST_SIZE))
    except FileNotFoundError:
        raise ArtifactNotFound(f"{directory}: no {MANIFEST_NAME}, so not an artifact") from None
    except (OSError, FileRefusedError) as error:
        raise ArtifactError(str(error)) from error


def _verify_file(path: Path, name: str, expected_sha256: str, expected_size: int) -> None:
    try:
        with open_regular(path) as (descriptor, identity):
            if identity.size != expected_size:
                raise DigestMismatch(name, f"{expected_size} bytes", f"{identity.size} bytes")
            hasher = hashlib.sha256()
            for chunk in chunks(descriptor):
                hasher.update(chunk)
    except FileNotFoundError:
        raise DigestMismatch(name, f"sha256:{expected_sha256}", "no file") from None
    except FileRefusedError as error:
        raise DigestMismatch(name, f"sha256:{expected_sha256}", str(error)) from None
    except OSError as error:
        raise ArtifactError(str(error)) from error
    if hasher.hexdigest() != expected_sha256:
        raise DigestMismatch(name, f"sha256:{expected_sha256}", f"sha256:{hasher.hexdigest()}")
