"""Which engines there are: fixed addresses, a name that is resolved again and again, a file that is watched.

Each source keeps its last good answer: a resolver that fails, or a file that is being written, makes no
engine leave. Knows addresses, not what answers there.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from weft import logs
from weft.rpc.address import Address, parse_address

DNS_PERIOD_S = 5.0
FILE_PERIOD_S = 1.0
# After so long a lookup is left to itself; the next one does not wait for it.
LOOKUP_TIMEOUT_S = 10.0
MAX_FILE_BYTES = 1 << 20
MAX_ENGINES = 1024
DNS_PREFIX, FILE_PREFIX = "dns:", "file:"
# A bracket begins a JSON list, or a line.
_IPV6_LINE = re.compile(r"\[[^\]\s\"]*:[^\]\s\"]*\]:")
log = logs.get_logger("gateway.discovery")
T = TypeVar("T")


class DiscoveryError(Exception):
    """A source gave no good answer. The text says why, and is the same for the same reason."""


class Source(Protocol):
    """Where addresses come from."""

    @property
    def period_s(self) -> float | None:
        """The time between two looks; None: it never changes."""

    def look(self) -> frozenset[str] | None:
        """The addresses now; None when nothing has changed. May block, so it runs in a thread. Raises
        DiscoveryError.
        """


@dataclass(frozen=True, slots=True)
class FixedSource:
    """One address."""

    address: Address
    period_s: float | None = None

    def look(self) -> frozenset[str] | None:
        """The address."""
        return frozenset({str(self.address)})


@dataclass(frozen=True, slots=True)
class DnsSource:
    """Every address behind a name."""

    name: str
    port: int
    period_s: float | None = DNS_PERIOD_S

    def look(self) -> frozenset[str] | None:
        """Resolve the name."""
        try:
            answers = socket.getaddrinfo(self.name, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise DiscoveryError(f"{self.name}: {error}") from error
        found = {str(Address(str(answer[4][0]), self.port)) for answer in answers}
        return _bounded(found, self.name)


class FileSource:
    """The addresses in a file: one a line, with # comments; a JSON list; or {"engines": [...]}.

    It is read when its time, size or inode changed. An empty file is one that is being written; no engines at
    all are `[]`.
    """

    def __init__(self, path: Path) -> None:
        self.period_s: float | None = FILE_PERIOD_S
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    def look(self) -> frozenset[str] | None:
        """Read the file if it has changed."""
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen == self._seen:
                return None
            if not self._path.is_file() or stat.st_size > MAX_FILE_BYTES:
                raise DiscoveryError(f"{self._path}: no regular file of at most {MAX_FILE_BYTES} bytes")
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._seen = None
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            raise DiscoveryError(f"{self._path}: {reason}") from error
        # A file that is bad is looked at once, not every second.
        self._seen = seen
        return parse_engine_list(text, str(self._path))


def parse_engine_list(text: str, name: str) -> frozenset[str]:
    """The addresses in the text of a file. Raises DiscoveryError."""
    if not text.strip():
        raise DiscoveryError(f"{name}: is empty")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    entries: object = [line for line in lines if line]
    if text.lstrip()[0] in "[{" and not _IPV6_LINE.match(text.lstrip()):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            raise DiscoveryError(f"{name}: is no JSON") from None
        if isinstance(entries, dict):
            entries = entries.get("engines")
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise DiscoveryError(f"{name}: a list of HOST:PORT is expected")
    return _bounded(map(_canonical, entries), name)


def _canonical(text: str) -> str:
    try:
        address = parse_address(text)
    except ValueError as error:
        raise DiscoveryError(str(error)) from None
    if not address.port:
        raise DiscoveryError(f"{text!r}: an engine needs a port")
    return str(address)


def _bounded(found: Iterable[str], name: str) -> frozenset[str]:
    addresses = frozenset(found)
    if len(addresses) > MAX_ENGINES:
        raise DiscoveryError(f"{name}: more than {MAX_ENGINES} engines")
    return addresses


def parse_source(text: str, *, dns_period_s: float = DNS_PERIOD_S) -> Source:
    """HOST:PORT, dns:NAME:PORT or file:PATH. Raises ValueError."""
    text = text.strip()
    if text.startswith(FILE_PREFIX):
        if not (path := text.removeprefix(FILE_PREFIX)):
            raise ValueError(f"{text!r}: expected file:PATH")
        return FileSource(Path(path))
    if text.startswith(DNS_PREFIX):
        address = parse_address(text.removeprefix(DNS_PREFIX))
        if not address.port:
            raise ValueError(f"{text!r}: expected dns:NAME:PORT")
        return DnsSource(address.host, address.port, dns_period_s)
    return FixedSource(parse_address(text))


class Discovery:
    """All sources together. `on_targets` is told the addresses, each once, whenever they change."""

    def __init__(self, sources: Sequence[Source], on_targets: Callable[[Sequence[str]], None]) -> None:
        self._sources = sources
        self._on_targets = on_targets
        # The fixed ones at once and together: nobody should wait for a resolver to use them.
        self._answers: list[frozenset[str]] = [
            (source.look() or frozenset()) if source.period_s is None else frozenset() for source in sources
        ]
        self._told: tuple[str, ...] = ()
        self.num_failures = 0
        self._tell()

    async def run(self) -> None:
        """Look until cancelled."""
        watches = [
            asyncio.create_task(self._watch(index, source, source.period_s))
            for index, source in enumerate(self._sources)
            if source.period_s is not None
        ]
        try:
            await asyncio.gather(*watches)
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def _watch(self, index: int, source: Source, period_s: float) -> None:
        problem = ""
        while True:
            try:
                answer = await _in_thread(source.look)
            except (DiscoveryError, TimeoutError) as error:
                self.num_failures += 1
                text = str(error) or "no answer in time"
                if text != problem:
                    log.warning("engines not found, the last list stays", reason=text)
                problem = text
            except (
                Exception
            ) as error:  # whatever it is: neither the other sources nor the next look end by it
                self.num_failures += 1
                if type(error).__name__ != problem:
                    log.failure("unhandled exception", error)
                problem = type(error).__name__
            else:
                if answer is not None:
                    problem = ""
                    self._answers[index] = answer
                    self._tell()
            await asyncio.sleep(period_s)

    def _tell(self) -> None:
        targets = tuple(dict.fromkeys(target for answer in self._answers for target in sorted(answer)))
        if targets != self._told:
            self._told = targets
            self._on_targets(targets)


async def _in_thread(work: Callable[[], T]) -> T:
    """The result of `work`, from a thread of its own that dies with the process: a resolver may hang for
    minutes, and must hold up neither the others nor the end. Raises TimeoutError.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="discovery", daemon=True).start()
    async with asyncio.timeout(LOOKUP_TIMEOUT_S):
        return await future
