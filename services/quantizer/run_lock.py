"""One run at a time for one name of an artifact. Standard library only.

The lock is the kernel's (flock), so it goes with its process, however that ends. The file beside it says who
holds it, for the message that another run gets. This module does not know what a run does.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from pathlib import Path
from types import TracebackType

from services.quantizer.errors import NameBusyError

LOCK_NAME = ".run.lock"
_MAX_HOLDER_SIZE = 512
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
_NUM_ATTEMPTS = 3
_PAUSE_S = 0.1


class RunLock:
    """Held while a run of a name is at work. `directory` is where the name's versions lie; it is made if it
    is missing. Entering raises NameBusyError at once when another run holds it.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        os.makedirs(self._path.parent, exist_ok=True)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
            try:
                _lock_exclusively(descriptor)
                if _is_same_file(descriptor, self._path):
                    holder = {"pid": os.getpid(), "host": platform.node()}
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
                    break
            except BlockingIOError:
                reason = _busy(self._path, descriptor)
                os.close(descriptor)
                raise NameBusyError(reason) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its last holder removed it between our opening and locking
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.unlink(self._path)  # still locked: whoever opened it meanwhile sees that it is gone
            except OSError:
                pass  # a file that stays is no lock
            finally:
                os.close(descriptor)


def refuse_if_busy(directory: Path) -> None:
    """NameBusyError when a run is at work below `directory`; takes and writes nothing, so that it works on a
    volume that may only be read. Whoever wants to be sure takes the lock.
    """
    path = directory / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NameBusyError(_busy(path, descriptor)) from None
    except OSError:
        return  # a filesystem without locks: taking the lock will say so
    finally:
        os.close(descriptor)


def _lock_exclusively(descriptor: int) -> None:
    """BlockingIOError when another run holds it; whoever only looks holds it for a moment."""
    for attempt in range(_NUM_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt + 1 == _NUM_ATTEMPTS:
                raise
        time.sleep(_PAUSE_S)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        ours, there = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _busy(path: Path, descriptor: int) -> str:
    who = ""
    try:
        holder = json.loads(os.pread(descriptor, _MAX_HOLDER_SIZE, 0))
        who = f" (process {int(holder['pid'])} on {str(holder['host'])[:64]})"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it has just taken the lock and not said yet who it is
    return f"another run of {path.parent.name} is at work{who} in {path.parent}"
