"""Write an artifact so that a reader sees all of it or nothing, whatever fails in between. Standard library
only.

Files go into a hidden sibling directory on the same filesystem and are synced as they are closed; the
manifest comes last; one rename makes the version appear, and another moves CURRENT. A writer holds a lock on
its staging directory, so the next publisher can tell an abandoned one from one at work. A writer that works
under a lease brings the lease's fencing token, and one whose lease went to another is refused. This module
does not know what the files hold.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from weft.artifact.history import append_history, pass_fence
from weft.artifact.manifest import (
    MANIFEST_NAME,
    ArtifactError,
    FileEntry,
    Manifest,
    is_file_name,
    is_model_name,
)
from weft.artifact.store import CURRENT_NAME, RUN_NAME, Artifact, ArtifactStore

_STAGING = re.compile(r"\.staging-[0-9a-f]{16}\Z")
_NEW_CURRENT = ".CURRENT.new"
_OLD_CURRENT = ".CURRENT.old"


class StagedFile:
    """A file being written: hashes what passes, syncs when closed. Use it as a context manager."""

    def __init__(self, staging: Staging, name: str) -> None:
        self._staging = staging
        self._name = name
        self._hasher = hashlib.sha256()
        self._size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(staging.path / name, flags, 0o644)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`."""
        view = memoryview(data).cast("B")
        self._hasher.update(view)
        self._size += len(view)
        _write_all(self._descriptor, view)

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        if kind is None:
            self._staging.files[self._name] = FileEntry(self._hasher.hexdigest(), self._size)


class Staging:
    """A new artifact of one model, invisible until `publish`. Leaving the context without it removes every
    trace.

    Attributes:
        path: the staging directory.
        files: what was written so far, as the manifest will list it.
    """

    def __init__(self, store: ArtifactStore, model: str) -> None:
        self.files: dict[str, FileEntry] = {}
        self._model = model
        self._parent = store.model_directory(model)
        self.path = self._parent / f".staging-{secrets.token_hex(8)}"
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        os.makedirs(self._parent, exist_ok=True)
        # A new model's directory could be lost otherwise, with all that is in it.
        _sync_directory(self._parent.parent)
        parent = os.open(self._parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Under the parent's lock no other publisher can take the new directory, not locked yet, for an
            # abandoned one.
            fcntl.flock(parent, fcntl.LOCK_EX)
            remove_abandoned(self._parent)
            os.mkdir(self.path, 0o755)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except BaseException:
            self._remove()
            raise
        finally:
            os.close(parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def create(self, name: str) -> StagedFile:
        """Begin a file of the artifact."""
        if not is_file_name(name) or name in (MANIFEST_NAME, RUN_NAME):
            raise ArtifactError(f"{name[:80]!r} is not a name for a file of an artifact")
        return StagedFile(self, name)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file of the artifact."""
        with self.create(name) as file:
            file.write(data)

    def rename(self, old: str, new: str) -> None:
        """Rename a written file, for names that are known only at the end (shards)."""
        if not is_file_name(new) or new in self.files:
            raise ArtifactError(f"{new[:80]!r} is not free as a name")
        os.rename(self.path / old, self.path / new)
        self.files[new] = self.files.pop(old)

    def publish(
        self, manifest: Manifest, version: str, run: bytes, *, fencing_token: int | None = None
    ) -> Artifact:
        """Make the artifact appear as `version` and CURRENT. `run` becomes run.json, which no digest covers.

        Should the version exist already (equal bytes published before) it is kept if it verifies, replaced if
        not. On any error the previous version stays CURRENT. Raises FencedError when a larger `fencing_token`
        has been here.
        """
        if manifest.files != self.files or manifest.model != self._model or not is_model_name(version):
            raise ArtifactError("the manifest does not describe what was staged")
        self._write_unlisted(RUN_NAME, run)
        self._write_unlisted(MANIFEST_NAME, manifest.to_bytes())
        _sync_directory(self.path)
        with locked(self._parent) as parent:  # one publisher of a model at a time from here on
            if fencing_token is not None:
                pass_fence(self._parent, fencing_token)
            self._rename_into_place(version, manifest.digest)
            os.fsync(parent)
            set_current(self._parent, parent, version, "publish")
        return Artifact(self._parent / version, manifest, self._model, version)

    def _rename_into_place(self, version: str, digest: str) -> None:
        target = self._parent / version
        try:
            os.rename(self.path, target)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if _is_intact(self._parent.parent, self._model, version, digest):
            return  # the same bytes are there; ours go with the staging directory
        damaged = self._parent / f".staging-{secrets.token_hex(8)}"
        os.rename(target, damaged)
        try:
            os.rename(self.path, target)
        except BaseException:
            os.rename(damaged, target)
            raise
        shutil.rmtree(damaged, ignore_errors=True)

    def _write_unlisted(self, name: str, data: bytes) -> None:
        with StagedFile(self, name) as file:
            file.write(data)
        del self.files[name]

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # gone already after a publish; what stays is abandoned
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold the lock of a model's directory; yields the directory's descriptor."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def claim_fence(store: ArtifactStore, model: str, token: int) -> None:
    """Say at the start of a run that a lease with `token` is at work: from now on no smaller one publishes.
    Raises FencedError when a larger one has been here.
    """
    directory = store.model_directory(model)
    os.makedirs(directory, exist_ok=True)
    with locked(directory):
        pass_fence(directory, token)


def remove_abandoned(parent: Path) -> None:
    """Remove staging directories whose writer is gone: their lock, held by a live writer, is free."""
    for name in os.listdir(parent):
        if not _STAGING.match(name):
            continue
        try:
            descriptor = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # removed meanwhile, or no directory: not ours to judge
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(parent / name, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def set_current(directory: Path, descriptor: int, version: str, how: str) -> None:
    """Point CURRENT at `version`, or leave it as it was: the way back is written before the step is taken.

    The caller holds the lock of `directory`, open as `descriptor`. `how` goes into HISTORY.
    """
    current, new, old = (directory / name for name in (CURRENT_NAME, _NEW_CURRENT, _OLD_CURRENT))
    previous = current.read_bytes() if current.exists() else None
    named = None if previous is None else previous.decode("ascii", "replace").strip()
    append_history(directory, named if named and is_model_name(named) else None, version, how)
    is_replaced = False
    try:
        if previous is not None:
            _write_synced(old, previous)
        _write_synced(new, version.encode("ascii") + b"\n")
        os.replace(new, current)
        is_replaced = True
        os.fsync(descriptor)
    except BaseException:
        if is_replaced:
            if previous is None:
                current.unlink(missing_ok=True)
            else:
                os.replace(old, current)
        raise
    finally:
        new.unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        _write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_intact(root: Path, model: str, version: str, digest: str) -> bool:
    store = ArtifactStore(root)
    try:
        artifact = store.open(model, version)
        store.verify(artifact)
    except ArtifactError:
        return False
    return artifact.manifest.digest == digest
