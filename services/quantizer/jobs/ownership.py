"""Which services on one state directory are alive: each holds a file lock that the system lets go when it
dies.

Also where that directory may lie. Knows no database.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_OWNER = re.compile(r"[0-9a-f]{16}")
_MOUNTS = Path("/proc/self/mountinfo")
# SQLite's write-ahead log needs memory that all its users share, which these do not give.
_NETWORK = re.compile(
    r"nfs|cifs|smb|9p|ceph|lustre|gluster|beegfs|gpfs|afs|fuse\.(?!overlay)|glusterfs|virtiofs"
)


class StateRefused(Exception):
    """The state directory may not lie there; the message is one line."""


class Ownership:
    """One service's name among those that share the directory, locked for as long as it lives."""

    def __init__(self, state: Path) -> None:
        self._directory = state / "owners"
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.owner = secrets.token_hex(8)
        self._path = self._directory / f"{self.owner}.lock"
        self._descriptor: int | None = os.open(
            self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def dead(self, owners: Iterable[str]) -> list[str]:
        """Those of `owners` whose lock nobody holds."""
        return [owner for owner in owners if owner != self.owner and self._is_dead(owner)]

    def release(self) -> None:
        """Give the name up. May come twice."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _is_dead(self, owner: str) -> bool:
        if not _OWNER.fullmatch(owner):
            return True
        path = self._directory / f"{owner}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return True


class Mount(NamedTuple):
    """One line of mountinfo."""

    number: str
    device: str
    root: str
    point: str
    kind: str


def check_state_directory(state: Path, artifacts: Path, mounts: str | None = None) -> None:
    """Raise StateRefused unless the state lies on a disk of this machine and apart from the artifacts.

    Apart means: neither below the other, whatever mounts lead there, and not both in one mounted volume. Two
    volumes that a container engine keeps on one disk are apart: they share a device number, but are different
    directories of it. `mounts` stands for /proc/self/mountinfo; where there is none the paths alone count.
    """
    state, artifacts = Path(os.path.realpath(state)), Path(os.path.realpath(artifacts))
    if _is_below(str(state), str(artifacts)) or _is_below(str(artifacts), str(state)):
        raise StateRefused(f"--state {state} and --artifacts {artifacts} must not lie in one another")
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return
    table = _parse_mounts(mounts)
    ours, theirs = _mount_of(state, table), _mount_of(artifacts, table)
    if ours is None or theirs is None:
        return
    if _NETWORK.match(ours.kind):
        raise StateRefused(f"--state {state}: it is on {ours.kind}; a disk of this machine is needed")
    if ours.number == theirs.number and ours.root != "/":
        raise StateRefused(f"--state {state}: it is on the volume {ours.point} that holds the artifacts")
    inner, outer = _inside(state, ours), _inside(artifacts, theirs)
    if ours.device == theirs.device and (_is_below(inner, outer) or _is_below(outer, inner)):
        raise StateRefused(f"--state {state}: by way of another mount it lies in --artifacts {artifacts}")


def _parse_mounts(text: str) -> list[Mount]:
    found: list[Mount] = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, kinds = head.split(" "), tail.split(" ")
        if len(fields) >= 5:
            found.append(Mount(fields[0], fields[2], _unescape(fields[3]), _unescape(fields[4]), kinds[0]))
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    # Of two at one point the later one hides the earlier.
    around = [mount for mount in mounts if _is_below(str(path), mount.point)]
    return max(reversed(around), key=lambda mount: len(mount.point), default=None)


def _inside(path: Path, mount: Mount) -> str:
    """The path as the mounted filesystem itself has it."""
    return os.path.normpath(os.path.join(mount.root, os.path.relpath(path, mount.point)))


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
