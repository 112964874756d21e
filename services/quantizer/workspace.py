"""What a run has finished, kept so that the same run can go on from there after any end. Standard library
only.

    <artifacts>/<name>/.work-<16 hex>/
        journal.json                 the finished blocks, and the sha256 of every file that belongs to them
        block-00001.safetensors      a block's tensors, packed as they will be published
        block-00001.json             what is known of it: errors, choices
        streams-00001.safetensors    the hidden states behind it

A block counts from the moment in which the journal that names it is renamed into place: its files were synced
before. Files that the journal does not name are leftovers and removed. What does not have the digest that the
journal gives is never used: the run goes on from the last block of which all is sound. Whoever uses a
workspace holds the name's RunLock. This module does not know what the files hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from services.quantizer.errors import NameBusyError
from services.quantizer.run_lock import RunLock
from weft import logs
from weft.artifact.regular_file import FileRefusedError, chunks, open_regular, read_regular
from weft.strict_json import StrictJsonError, parse_object

_LOGGER = logs.get_logger("quantizer")
_FORMAT = 1
_JOURNAL = "journal.json"
_NEW_JOURNAL = "journal.json.new"
_MAX_JOURNAL_SIZE = 16 << 20
_MAX_RECORD_SIZE = 256 << 20
_DIRECTORY = re.compile(r"\.work-[0-9a-f]{16}\Z")
_FILE = re.compile(r"(block|streams)-\d{5}\.(safetensors|json)\Z")
_PARTS = ("tensors", "record", "streams")

Write = Callable[[bytes | memoryview], Any]
"""Appends bytes to a file that is being written."""


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file of the workspace as it was when it was synced."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class KeptBlock:
    """The files of a finished block. Only the newest block's `streams` need exist."""

    tensors: KeptFile
    record: KeptFile
    streams: KeptFile


class Workspace:
    """The state of one run. `key` (hex) says what it makes and names the directory; `identity` is whatever
    decides its bytes, and what another identity kept is not used. A context: if no block is finished when it
    is left, the directory goes.

    Attributes:
        path: its directory.
        blocks: the finished ones, all sound.
    """

    def __init__(self, parent: Path, key: str, identity: str) -> None:
        self.path = _path(parent, key)
        self._identity = identity
        self.blocks: list[KeptBlock] = []
        self._is_read = False

    def __enter__(self) -> Workspace:
        os.makedirs(self.path, exist_ok=True)
        _sync_directory(self.path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None
    ) -> None:
        if self._is_read and not self.blocks:
            self.remove()

    def resume(self) -> int:
        """Read the journal, check every file it names, remove all others; the number of sound blocks."""
        self.blocks = self._read_journal()
        self.blocks = self.blocks[: self._num_sound()]
        named = {_JOURNAL} if self.blocks else set()
        for block in self.blocks:
            named |= {block.tensors.name, block.record.name}
        if self.blocks:
            named.add(self.blocks[-1].streams.name)
        for name in os.listdir(self.path):
            if name not in named:
                self._unlink(name)
        self._is_read = True
        return len(self.blocks)

    def start_over(self) -> None:
        """Forget what was finished."""
        self.blocks = []
        self._unlink(_JOURNAL)
        for name in os.listdir(self.path):
            self._unlink(name)

    def write_tensors(self, write: Callable[[Write], Any]) -> KeptFile:
        """The tensors of the next block, as `write` writes them."""
        return self._write(f"block-{len(self.blocks) + 1:05d}.safetensors", write)

    def finish_block(self, tensors: KeptFile, record: bytes, write_streams: Callable[[Write], Any]) -> None:
        """Make the next block count: its record, the streams behind it, the journal."""
        number = len(self.blocks) + 1
        # The streams before the newest are of no use while the newest are sound; those are kept until the
        # journal names the next.
        for block in self.blocks[-2:-1]:
            self._unlink(block.streams.name)
        kept = KeptBlock(
            tensors,
            self._write(f"block-{number:05d}.json", lambda write: write(record)),
            self._write(f"streams-{number:05d}.safetensors", write_streams),
        )
        _sync_directory(self.path)
        self._write_journal([*self.blocks, kept])
        self.blocks.append(kept)

    def record(self, number: int) -> bytes:
        """The record of block `number`, from 1."""
        return read_regular(self.path / self.blocks[number - 1].record.name, _MAX_RECORD_SIZE)

    def tensors_path(self, number: int) -> Path:
        """The tensors of block `number`, from 1."""
        return self.path / self.blocks[number - 1].tensors.name

    def streams_path(self) -> Path:
        """The streams behind the newest block."""
        return self.path / self.blocks[-1].streams.name

    def remove(self) -> None:
        """Remove the directory; should that be cut short, what is left has no journal and counts nothing."""
        self.blocks = []
        _remove(self.path)

    def _num_sound(self) -> int:
        num_sound = 0
        for number, block in enumerate(self.blocks, 1):
            reason = self._damage(block.tensors) or self._damage(block.record)
            if reason is not None:
                _LOGGER.warning("damaged state", path=str(self.path), block=number, reason=reason)
                break
            num_sound = number
        # The newest streams first: without them a block is as good as not done, for none follows from it.
        for number in range(num_sound, 0, -1):
            reason = self._damage(self.blocks[number - 1].streams)
            if reason is None:
                return number
            if number == len(self.blocks) or "missing" not in reason:
                _LOGGER.warning("damaged state", path=str(self.path), block=number, reason=reason)
        return 0

    def _damage(self, kept: KeptFile) -> str | None:
        """What is wrong with a file, or None."""
        path = self.path / kept.name
        try:
            with open_regular(path) as (descriptor, identity):
                if identity.size != kept.size:
                    return f"{kept.name}: {identity.size} bytes, {kept.size} were written"
                hasher = hashlib.sha256()
                for chunk in chunks(descriptor):
                    hasher.update(chunk)
        except FileNotFoundError:
            return f"{kept.name}: missing"
        except (OSError, FileRefusedError) as error:
            return str(error)
        return None if hasher.hexdigest() == kept.sha256 else f"{kept.name}: other bytes than were written"

    def _read_journal(self) -> list[KeptBlock]:
        path = self.path / _JOURNAL
        try:
            document = parse_object(read_regular(path, _MAX_JOURNAL_SIZE), str(path))
            if document["format"] != _FORMAT or document["identity"] != self._identity:
                _LOGGER.info(
                    "what was kept is of another program, machine or number of threads", path=str(path)
                )
                return []
            return [KeptBlock(*(_kept_file(block[part]) for part in _PARTS)) for block in document["blocks"]]
        except FileNotFoundError:
            return []
        except (OSError, FileRefusedError, StrictJsonError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            _LOGGER.warning("damaged state", path=str(self.path), block=0, reason=reason)
            return []

    def _write_journal(self, blocks: list[KeptBlock]) -> None:
        document = {
            "format": _FORMAT,
            "identity": self._identity,
            "blocks": [asdict(block) for block in blocks],
        }
        self._write(_NEW_JOURNAL, lambda write: write(json.dumps(document, indent=1).encode() + b"\n"))
        os.replace(self.path / _NEW_JOURNAL, self.path / _JOURNAL)
        _sync_directory(self.path)

    def _write(self, name: str, write: Callable[[Write], Any]) -> KeptFile:
        """A whole file, synced. What fails is removed, for a full disk's sake."""
        hasher, size = hashlib.sha256(), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path / name, flags, 0o644)

        def append(data: bytes | memoryview) -> None:
            nonlocal size
            view = memoryview(data).cast("B")
            hasher.update(view)
            size += len(view)
            while view:
                view = view[os.write(descriptor, view) :]

        try:
            write(append)
            os.fsync(descriptor)
        except BaseException:
            self._unlink(name)
            raise
        finally:
            os.close(descriptor)
        return KeptFile(name, hasher.hexdigest(), size)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path / name)


def remove_others(parent: Path, keep: Path | None = None) -> None:
    """Remove the workspaces of other runs of a name, whose lock the caller holds: they are abandoned."""
    for path in _directories(parent):
        if path != keep:
            _LOGGER.info("removing abandoned state", path=str(path))
            _remove(path)


def remove_own(parent: Path, key: str) -> None:
    """Remove what a run kept that ended between publishing and cleaning up. It is tried, no more."""
    path = _path(parent, key)
    if path.is_dir():
        with contextlib.suppress(OSError, NameBusyError), RunLock(parent):
            _remove(path)


def _path(parent: Path, key: str) -> Path:
    return parent / f".work-{key[:16]}"


def _directories(parent: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(parent)):
            if _DIRECTORY.match(name) and (parent / name).is_dir() and not (parent / name).is_symlink():
                yield parent / name


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path / _JOURNAL)
    shutil.rmtree(path, ignore_errors=True)


def _kept_file(value: dict[str, Any]) -> KeptFile:
    kept = KeptFile(**value)
    if not (_FILE.match(kept.name) and isinstance(kept.sha256, str) and isinstance(kept.size, int)):
        raise ValueError(f"{kept.name[:80]!r} is no file of a workspace")
    return kept


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
