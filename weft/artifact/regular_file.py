"""Read files of an untrusted directory: regular files alone, no link followed, no size taken on trust.

Names are single path components; whoever builds one from file contents must have checked it with a pattern of
its own. This module knows nothing of what the files hold.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_CHUNK_SIZE = 1 << 20


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
    # O_NONBLOCK: opening a pipe that nobody writes to would otherwise wait for ever.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileRefusedError(f"{path}: a symbolic link; put the file itself here") from None
        raise
    try:
        yield descriptor, _identify(descriptor, path)
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
    """Fill `buffer` from `offset`; FileRefusedError when the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise FileRefusedError(f"{path}: ends at byte {offset + done}, {len(buffer) - done} bytes early")
        done += count


def chunks(descriptor: int) -> Iterator[bytes]:
    """The bytes of an open file, a MiB at a time."""
    while chunk := os.read(descriptor, _CHUNK_SIZE):
        yield chunk


def _identify(descriptor: int, path: Path) -> FileIdentity:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FileRefusedError(f"{path}: not a regular file")
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
