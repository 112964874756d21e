"""Read files of an untrusted directory: regular files alone, no size taken on trust, almost no link followed.

The exception is how the cache of the Hugging Face hub is built: snapshots/<revision>/<file> links to
../../blobs/<digest>. A link of exactly that form is opened there; it cannot leave the model's own directory.

Names are single path components; whoever builds one from file contents must have checked it with a pattern of
its own. This module knows nothing of what the files hold.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_CHUNK_SIZE = 1 << 20
_HUB_LINK = re.compile(r"\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})\Z")
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class FileRefusedError(ValueError):
    """The file exists but is a link, a directory, a device, a pipe, or larger than its kind may be."""


class FileIdentity(NamedTuple):
    """What must not change between two reads of one file."""

    device: int
    inode: int
    size: int
    modified_ns: int


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, FileIdentity]]:
    """Yield (descriptor, identity) of a regular file. OSError when it is missing, FileRefusedError when it
    is no plain file.
    """
    descriptor = _open(path)
    try:
        yield descriptor, identify(descriptor, path)
    finally:
        os.close(descriptor)


def read_regular(path: Path, max_size: int) -> bytes:
    """The whole of a regular file of at most `max_size` bytes."""
    with open_regular(path) as (descriptor, identity):
        if identity.size > max_size:
            raise FileRefusedError(f"{path}: {identity.size} bytes; at most {max_size} are read")
        buffer = bytearray(identity.size)
        read_exactly(descriptor, memoryview(buffer), 0, path)
        return bytes(buffer)


def read_exactly(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from `offset`; FileRefusedError when the file ends before, OSError that names it when the
    disk fails.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        if count == 0:
            raise FileRefusedError(f"{path}: ends at byte {offset + done}, {len(buffer) - done} bytes early")
        done += count


def chunks(descriptor: int) -> Iterator[bytes]:
    """The bytes of an open file, a MiB at a time."""
    while chunk := os.read(descriptor, _CHUNK_SIZE):
        yield chunk


def _open(path: Path) -> int:
    # O_NONBLOCK: opening a pipe that nobody writes to would otherwise wait for ever.
    try:
        return os.open(path, _FLAGS)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    blob = _hub_blob(path)
    try:
        if blob is not None:
            return os.open(blob, _FLAGS)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    raise FileRefusedError(
        f"{path}: a symbolic link out of its directory, which is not followed; "
        f"copy the files themselves: cp -rL {path.parent} NEW_DIRECTORY"
    )


def _hub_blob(path: Path) -> Path | None:
    """Where a link of the hub's cache leads, or None when it is any other link."""
    match = _HUB_LINK.match(os.readlink(path))
    snapshots = path.parent.resolve().parent
    blobs = snapshots.parent / "blobs"
    if match is None or snapshots.name != "snapshots" or blobs.is_symlink():
        return None
    return blobs / match[1]


def identify(descriptor: int, path: Path) -> FileIdentity:
    """Of an open file as it is now. FileRefusedError when it is no plain file."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FileRefusedError(f"{path}: not a regular file")
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
