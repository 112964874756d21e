"""What lies beside a model's versions for its writers: HISTORY, which says what CURRENT named before, and
.fence, which keeps a writer out that lost its lease. Standard library only.

HISTORY is append-only, one JSON line per switch of CURRENT, synced before the switch is made. A line tells
what CURRENT named when it was written, so the version before this one is known without a clock, and a line
whose switch never came about misleads nobody. This module takes no lock: callers hold that of the model's
directory.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from weft.artifact.manifest import ArtifactError, is_model_name
from weft.artifact.regular_file import FileRefusedError, read_regular

HISTORY_NAME = "HISTORY"
FENCE_NAME = ".fence"
_NEW_FENCE = ".fence.new"
_MAX_HISTORY_SIZE = 64 << 20
_MAX_FENCE_SIZE = 64
MAX_TOKEN = (1 << 62) - 1


class FencedError(ArtifactError):
    """A later holder of the lease has been here: what this writer made must not be published."""


@dataclass(frozen=True, slots=True)
class Switch:
    """CURRENT went from `previous` (None: there was none) to `version`. `time` is for people."""

    previous: str | None
    version: str
    how: str
    time: str


def read_history(directory: Path) -> list[Switch]:
    """The switches of a model, oldest first. What is no whole line, as after a crash, is left out."""
    path = directory / HISTORY_NAME
    try:
        data = read_regular(path, _MAX_HISTORY_SIZE)
    except FileNotFoundError:
        return []
    except (OSError, FileRefusedError) as error:
        raise ArtifactError(str(error)) from error
    return [switch for line in data.split(b"\n") if (switch := _parse(line)) is not None]


def append_history(directory: Path, previous: str | None, version: str, how: str) -> None:
    """Add a line and sync it. `how` is one word, as in "publish"."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"from": previous, "to": version, "how": how, "time": now}, sort_keys=True).encode()
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(directory / HISTORY_NAME, flags, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a crash cut the last line off
        view = memoryview(line + b"\n")
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def previous_version(history: list[Switch], current: str) -> str | None:
    """What CURRENT named before it named `current`, or None when that is not told."""
    for switch in reversed(history):
        if switch.version == current and switch.previous != current:
            return switch.previous
    return None


def last_mentions(history: list[Switch]) -> dict[str, tuple[int, str]]:
    """For each version the last line that names it, on either side, and that line's time."""
    return {
        version: (index, switch.time)
        for index, switch in enumerate(history)
        for version in (switch.previous, switch.version)
        if version is not None
    }


def read_fence(directory: Path) -> int:
    """The largest fencing token that has been here; 0 when none has."""
    path = directory / FENCE_NAME
    try:
        text = read_regular(path, _MAX_FENCE_SIZE).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return 0
    except (OSError, FileRefusedError) as error:
        raise ArtifactError(str(error)) from error
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_TOKEN):
        raise ArtifactError(f"{path}: {text[:40]!r} is no fencing token")
    return int(text)


def pass_fence(directory: Path, token: int) -> None:
    """Record `token`, or raise FencedError if a larger one has been here. The caller holds the lock."""
    found = read_fence(directory)
    if found > token:
        raise FencedError(
            f"{directory.name}: fencing token {token}, but {found} has been here: the lease was lost"
        )
    if found == token:
        return
    new = directory / _NEW_FENCE
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, b"%d\n" % token)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(new, directory / FENCE_NAME)
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _parse(line: bytes) -> Switch | None:
    try:
        document = json.loads(line)
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    previous, version = document.get("from"), document.get("to")
    if not (isinstance(version, str) and is_model_name(version)):
        return None
    if previous is not None and not (isinstance(previous, str) and is_model_name(previous)):
        return None
    return Switch(previous, version, str(document.get("how", "")), str(document.get("time", "")))
