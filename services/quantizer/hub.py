"""A model of the Hugging Face hub as a directory: one commit of it, only the files that are read anyway.

The hub's listing of the commit says which files there are, how large, and with which digest; nothing is taken
that the listing and the digest do not agree on, wherever the bytes came from. Files are laid out as the hub's
own cache has them (blobs/<digest>, links in snapshots/<commit>), so other programs find them and those of
other programs are used. A file that was interrupted goes on where it stopped. Nothing is executed, and
nothing is reported to anybody. This module does not know what is in the files, except the index, which names
the shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from services.quantizer.errors import QuantizerError
from weft import logs
from weft.artifact.regular_file import FileRefusedError, chunks, open_regular, read_regular
from weft.strict_json import StrictJsonError, parse_object

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\.safetensors\Z")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_DIGEST = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\Z")
_MAX_SMALL_SIZE = 256 << 20
_MAX_SHARDS = 4096
_TIMEOUT_S = 30.0
_UNAUTHORIZED = 401
_LOGGER = logs.get_logger("quantizer")


@dataclass(frozen=True, slots=True)
class _File:
    """`digest`: sha256 of what git keeps elsewhere, else git's own sha1; both in hexadecimal."""

    name: str
    size: int
    digest: str


def fetch(repository: str, revision: str, cache: Path | None = None) -> tuple[Path, str]:
    """(directory, commit) of a model at a revision: a commit, a tag, or a branch as it is now.

    Downloads what the cache lacks. Without the network, a commit that is there whole is used as it is. Raises
    QuantizerError.
    """
    constants.HF_HUB_DISABLE_TELEMETRY = True
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    root = Path(constants.HF_HUB_CACHE if cache is None else cache)
    storage = root / f"models--{repository.replace('/', '--')}"
    with _one_line(repository):
        try:
            commit, files = _list(repository, revision)
        except Exception as error:
            snapshot = storage / "snapshots" / revision
            if not _is_unreachable(error) or not _is_whole(snapshot):
                raise
            _LOGGER.warning("hub not reached; using the cache", model=repository, revision=revision)
            return snapshot, revision
        _LOGGER.info("hub model", model=repository, revision=revision, commit=commit)
        snapshot = storage / "snapshots" / commit
        for directory in (snapshot, storage / "blobs"):
            directory.mkdir(parents=True, exist_ok=True)
        small = [files[name] for name in SMALL_FILES if name in files]
        if _SINGLE not in files and _INDEX in files:
            small.append(files[_INDEX])
        for file in small:
            if file.size > _MAX_SMALL_SIZE:
                raise QuantizerError(f"{repository}: {file.name}: {file.size} bytes are too many")
        _download(repository, commit, storage, small)
        _download(repository, commit, storage, _weights(repository, files, snapshot))
    return snapshot, commit


def _list(repository: str, revision: str) -> tuple[str, dict[str, _File]]:
    """(commit, files at the top of it by name), as the hub tells."""
    info = HfApi(endpoint=constants.ENDPOINT).model_info(
        repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
    )
    commit = info.sha or ""
    if not _COMMIT.match(commit) or (_COMMIT.match(revision) and commit != revision):
        raise QuantizerError(f"{repository}: asked for {revision}, the hub answers for {commit[:40]!r}")
    files: dict[str, _File] = {}
    for entry in info.siblings or []:
        name: Any = entry.rfilename
        if name not in (*SMALL_FILES, _SINGLE, _INDEX) and not _is_shard_name(name) and not _is_pickle(name):
            continue
        digest: Any = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if type(entry.size) is not int or entry.size < 0 or not _DIGEST.match(str(digest)):
            raise QuantizerError(f"{repository}: the hub does not tell size and digest of {name}")
        files[name] = _File(name, entry.size, digest)
    if "config.json" not in files:
        raise QuantizerError(f"{repository}: no config.json at {revision}")
    return commit, files


def _weights(repository: str, files: dict[str, _File], snapshot: Path) -> list[_File]:
    """The safetensors files: the single one, or the shards that the index names."""
    if _SINGLE in files:
        return [files[_SINGLE]]
    if _INDEX not in files:
        pickle = next((name for name in sorted(files) if _is_pickle(name)), None)
        found = f"only pickled weights ({pickle}), which are never read" if pickle else "no safetensors"
        raise QuantizerError(f"{repository}: {found}")
    shards = _shards(snapshot)
    missing = next((name for name in shards if name not in files), None)
    if missing is not None:
        raise QuantizerError(f"{repository}: {_INDEX} names {missing[:80]!r}, which is no file of the model")
    return [files[name] for name in shards]


def _shards(snapshot: Path) -> list[str]:
    path = snapshot / _INDEX
    try:
        weight_map = parse_object(read_regular(path, _MAX_SMALL_SIZE), str(path)).get("weight_map")
    except (FileRefusedError, StrictJsonError) as error:
        raise QuantizerError(str(error)) from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise QuantizerError(f"{path}: no weight_map")
    names = sorted(set(weight_map.values()))
    if len(names) > _MAX_SHARDS or not all(_is_shard_name(name) for name in names):
        raise QuantizerError(f"{path}: the weight_map names what cannot be a shard")
    return names


def _download(repository: str, commit: str, storage: Path, files: list[_File]) -> None:
    """Bring `files` into the cache and link them; the room for all of them is looked for first."""
    missing = [file for file in files if not (storage / "blobs" / file.digest).exists()]
    needed = sum(file.size - _partial_size(storage, file) for file in missing)
    free = shutil.disk_usage(storage).free
    if needed > free:
        raise QuantizerError(
            f"{repository}: {_gib(needed)} are to be downloaded, {_gib(free)} are free in {storage.parent}"
        )
    for file in files:
        if file in missing:
            _fetch_blob(repository, commit, storage, file)
        link = storage / "snapshots" / commit / file.name
        target = Path("..", "..", "blobs", file.digest)
        if os.path.lexists(link) and (not link.is_symlink() or Path(os.readlink(link)) != target):
            raise QuantizerError(f"{link}: not what this commit holds; remove it")
        if not os.path.lexists(link):
            link.symlink_to(target)


def _fetch_blob(repository: str, commit: str, storage: Path, file: _File) -> None:
    blob, partial = storage / "blobs" / file.digest, _partial_path(storage, file)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(partial, flags, 0o644), "r+b") as stream:
        # Two jobs may want the same model: the second waits, and finds it there.
        fcntl.flock(stream, fcntl.LOCK_EX)
        if blob.exists():
            return
        begin = stream.seek(0, os.SEEK_END)
        if begin > file.size:
            begin = stream.truncate(0)
            stream.seek(0)
        _LOGGER.info("downloading", model=repository, file=file.name, size=file.size, begin=begin)
        http_get(
            f"{constants.ENDPOINT}/{repository}/resolve/{commit}/{file.name}",
            cast(BinaryIO, _Bounded(stream, file)),
            resume_size=begin,
            headers=build_hf_headers(),
            expected_size=file.size,
        )
        stream.flush()
        os.fsync(stream.fileno())
        found = _digest(partial, file)
        if found != file.digest:
            partial.unlink()
            raise QuantizerError(f"{repository}: {file.name}: digest {found}, the hub promises {file.digest}")
        os.replace(partial, blob)


class _Bounded:
    """The file being written, for no more bytes than were announced: an endless answer fills no disk."""

    def __init__(self, stream: BinaryIO, file: _File) -> None:
        self._stream, self._file = stream, file
        self.seek, self.tell, self.truncate = stream.seek, stream.tell, stream.truncate

    def write(self, data: bytes) -> int:
        if self._stream.tell() + len(data) > self._file.size:
            raise QuantizerError(f"{self._file.name}: the answer is longer than {self._file.size} bytes")
        return self._stream.write(data)


def _digest(path: Path, file: _File) -> str:
    """Of the same kind as the expected one."""
    hasher = hashlib.sha256()
    if len(file.digest) == hashlib.sha1().digest_size * 2:
        hasher = hashlib.sha1(b"blob %d\0" % file.size)  # how git names contents
    with open_regular(path) as (descriptor, _):
        for chunk in chunks(descriptor):
            hasher.update(chunk)
    return hasher.hexdigest()


def _partial_path(storage: Path, file: _File) -> Path:
    return storage / "blobs" / f"{file.digest}.weft-partial"


def _partial_size(storage: Path, file: _File) -> int:
    try:
        return min(_partial_path(storage, file).stat().st_size, file.size)
    except FileNotFoundError:
        return 0


def _is_whole(snapshot: Path) -> bool:
    """Whether the cache holds all weights. They come last, so nothing else is missing then."""
    if not (snapshot / "config.json").exists():
        return False
    if (snapshot / _SINGLE).exists():
        return True
    try:
        return all((snapshot / name).exists() for name in _shards(snapshot))
    except (OSError, QuantizerError):
        return False


def _is_shard_name(name: object) -> bool:
    return isinstance(name, str) and _SHARD.match(name) is not None and ".." not in name


def _is_pickle(name: object) -> bool:
    return isinstance(name, str) and "/" not in name and name.endswith(_PICKLES)


def _is_unreachable(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_told = isinstance(error, HfHubHTTPError | QuantizerError) and (status is None or status < 500)
    return not is_told


@contextmanager
def _one_line(repository: str) -> Iterator[None]:
    """Whatever the client raises, the reader gets one line."""
    try:
        yield
    except QuantizerError:
        raise
    except Exception as error:
        _refuse(repository, error)


def _refuse(repository: str, error: Exception) -> NoReturn:
    where = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set and the cache does not hold all of it"
    elif isinstance(error, GatedRepoError):
        text = f"{where} gates it: ask for access on its page, then set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        text = f"{where} has no such model, or it is private and HF_TOKEN does not open it"
    elif isinstance(error, RevisionNotFoundError):
        text = f"{where} has no such revision of it"
    elif status == _UNAUTHORIZED:
        text = f"{where} does not accept HF_TOKEN, or wants one"
    elif status is not None:
        text = f"{where} answers with status {status}"
    else:
        # Without the addresses that a message may hold: those of a content network are signed.
        words = " ".join(re.sub(r"https?://\S+", "the hub", str(error)).split())
        text = f"{where}: {type(error).__name__}: {words[:200]}"
    raise QuantizerError(f"{repository}: {text}") from error


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
