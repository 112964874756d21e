"""What is done with artifacts after they are published: list, roll back, remove old ones. Standard library
only.

All that changes something does so under the publisher's lock of the model. Which version came before which is
read from HISTORY; clocks are asked only how old a version is, and one that seems to come from the future
counts as new. This module does not know what the files hold.
"""

from __future__ import annotations

import calendar
import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weft.artifact.history import last_mentions, previous_version, read_history
from weft.artifact.manifest import ArtifactError, ArtifactNotFound, Manifest, is_model_name
from weft.artifact.publish import locked, remove_abandoned, set_current
from weft.artifact.regular_file import FileRefusedError, read_regular
from weft.artifact.store import RUN_NAME, ArtifactStore

# Held, as a file lock, by a run of the quantizer: the directories that it goes on from are in use then.
RUN_LOCK_NAME = ".run.lock"
_MAX_RUN_SIZE = 1 << 20
_WORK = re.compile(r"\.work-[0-9a-f]{16}\Z")
_LEFTOVER = re.compile(r"\.(work|staging)-[0-9a-f]{16}\Z")


@dataclass(frozen=True, slots=True)
class Version:
    """A published version. `started` is run.json's time, "" without one; `problem` says why there is no
    manifest.
    """

    model: str
    version: str
    is_current: bool
    size: int
    started: str
    manifest: Manifest | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Removal:
    """What `collect` did with one version or leftover directory. `why` is one word or a short phrase."""

    model: str
    name: str
    size: int
    is_removed: bool
    why: str


def list_versions(store: ArtifactStore, model: str) -> list[Version]:
    """Every version of a model, newest first. One that cannot be read is listed with its problem."""
    try:
        current = store.current(model)
    except ArtifactError:
        current = ""
    found = []
    for name in _newest_first(store, model):
        path = store.model_directory(model) / name
        manifest, problem = None, ""
        try:
            manifest = store.open(model, name).manifest
        except ArtifactError as error:
            problem = str(error)
        size = sum(entry.size for entry in manifest.files.values()) if manifest else _tree_size(path)
        found.append(Version(model, name, name == current, size, _started(path), manifest, problem))
    return found


def roll_back(store: ArtifactStore, model: str, version: str | None = None) -> tuple[str, str]:
    """Point CURRENT at `version`, or at what it named before; returns (from, to).

    The target's every file is verified first. Raises ArtifactNotFound when there is no such version, or no
    previous one that is still there; DigestMismatch when it is damaged: CURRENT then stays.
    """
    directory = store.model_directory(model)
    current = store.current(model)
    target = version or _previous(store, model, current)
    artifact = store.open(model, target)
    store.verify(artifact)
    with locked(directory) as descriptor:
        current = store.current(model)
        if version is None and _previous(store, model, current) != target:
            raise ArtifactError(f"model {model}: CURRENT moved meanwhile; try again")
        if store.open(model, target).manifest.digest != artifact.manifest.digest:
            raise ArtifactError(f"model {model}: version {target} was replaced meanwhile; try again")
        if current != target:
            set_current(directory, descriptor, target, "rollback")
    return current, target


def collectable(store: ArtifactStore) -> list[str]:
    """Models for `collect`, sorted: those that have a CURRENT version, and those of which nothing was ever
    published but a run has left something.
    """
    found = set(store.models())
    for name in os.listdir(store.root):
        if is_model_name(name) and not (store.root / name).is_symlink() and (store.root / name).is_dir():
            found |= {name for entry in os.listdir(store.root / name) if _LEFTOVER.match(entry)}
    return sorted(found)


def collect(
    store: ArtifactStore, model: str, keep: int, grace_s: float, *, is_dry: bool = False
) -> list[Removal]:
    """Remove the oldest versions beyond `keep`, and what crashed writers left; tells each verdict.

    Never removed: any version while there is no CURRENT; CURRENT, a version that was published or current
    less than `grace_s` seconds ago, one whose directory a reader holds a lock on. A removed version goes by
    one rename, so no reader sees half of one.
    """
    directory = store.model_directory(model)
    if not directory.is_dir():
        raise ArtifactNotFound(f"model {model}: nothing in {store.root}")
    with locked(directory) as descriptor:
        excess = []
        with contextlib.suppress(ArtifactNotFound):
            current = store.current(model)
            others = [name for name in _newest_first(store, model) if name != current]
            excess = others[max(keep - 1, 0) :]
        verdicts = [_collect_version(directory, model, name, grace_s, is_dry) for name in excess]
        verdicts += _collect_leftovers(directory, model, grace_s, is_dry)
        os.fsync(descriptor)
    return verdicts


@contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether nobody holds a lock on the directory; it is locked while the context lasts."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


@contextmanager
def _no_run(directory: Path) -> Iterator[bool]:
    """Whether no run of this name is at work; while the context lasts none can begin."""
    path = directory / RUN_LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, there = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            raise BlockingIOError  # one run ended and another began between our opening and locking
    except (BlockingIOError, FileNotFoundError):
        yield False
    else:
        yield True
        path.unlink(missing_ok=True)  # still locked: whoever opened it meanwhile sees that it is gone
    finally:
        os.close(descriptor)


def _collect_version(directory: Path, model: str, name: str, grace_s: float, is_dry: bool) -> Removal:
    path = directory / name
    size = _tree_size(path)
    age = _age(directory, name)
    if age < grace_s:
        return Removal(model, name, size, False, "younger than the grace")
    with _unused(path) as is_unused:
        if not is_unused:
            return Removal(model, name, size, False, "in use")
        if not is_dry:
            doomed = directory / f".staging-{secrets.token_hex(8)}"
            os.rename(path, doomed)  # a kill from here on leaves what the next publisher removes
            shutil.rmtree(doomed, ignore_errors=True)
    return Removal(model, name, size, True, "old")


def _collect_leftovers(directory: Path, model: str, grace_s: float, is_dry: bool) -> list[Removal]:
    with _no_run(directory) as is_idle:
        found = _leftovers(directory, model, grace_s, is_idle, is_dry)
    if not is_dry:
        remove_abandoned(directory)
    return found


def _leftovers(directory: Path, model: str, grace_s: float, is_idle: bool, is_dry: bool) -> list[Removal]:
    found = []
    for name in sorted(os.listdir(directory)):
        is_work = _WORK.match(name) is not None
        path = directory / name
        if not (is_work or name.startswith(".staging-")) or path.is_symlink() or not path.is_dir():
            continue
        size = _tree_size(path)
        # The state of a run that was killed is worth keeping for a while: the same command goes on from it.
        if is_work and time.time() - _newest_change(path) < grace_s:
            found.append(Removal(model, name, size, False, "younger than the grace"))
            continue
        with contextlib.suppress(OSError), _unused(path) as is_unused:
            is_free = is_unused and (is_idle or not is_work)
            if is_free and is_work and not is_dry:
                shutil.rmtree(path, ignore_errors=True)
            found.append(Removal(model, name, size, is_free, "abandoned" if is_free else "in use"))
    return found


def _previous(store: ArtifactStore, model: str, current: str) -> str:
    previous = previous_version(read_history(store.model_directory(model)), current)
    if previous is not None:
        return previous
    # Published before there was a HISTORY: what started last before the current one did.
    older = [name for name in _newest_first(store, model) if name != current]
    if not older:
        raise ArtifactNotFound(f"model {model}: there is no version before {current}")
    return older[0]


def _newest_first(store: ArtifactStore, model: str) -> list[str]:
    """By the last line of HISTORY that names it; what HISTORY does not know is older than what it does, and
    ordered by run.json.
    """
    directory = store.model_directory(model)
    mentions = last_mentions(read_history(directory))

    def rank(name: str) -> tuple[int, str, str]:
        index = mentions[name][0] if name in mentions else -1
        return index, _started(directory / name), name

    return sorted(store.versions(model), key=rank, reverse=True)


def _started(path: Path) -> str:
    try:
        document = json.loads(read_regular(path / RUN_NAME, _MAX_RUN_SIZE))
    except (OSError, ValueError, FileRefusedError):
        return ""
    started = document.get("started") if isinstance(document, dict) else None
    return started[:32] if isinstance(started, str) else ""


def _age(directory: Path, name: str) -> float:
    """Seconds since the version was last published or CURRENT, by whatever says the least."""
    times = [_newest_change(directory / name)]
    mention = last_mentions(read_history(directory)).get(name)
    if mention is not None:
        with contextlib.suppress(ValueError):
            times.append(calendar.timegm(time.strptime(mention[1], "%Y-%m-%dT%H:%M:%SZ")))
    return time.time() - max(times)


def _newest_change(path: Path) -> float:
    times = [path.lstat().st_mtime]
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                times.append(os.lstat(os.path.join(folder, name)).st_mtime)
    return max(times)


def _tree_size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total
