"""Files that may change while a server runs: keys, certificates. Knows a file by its paths, not its sense."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weft import logs

log = logs.get_logger("reload")
_Signature = tuple[tuple[int, int, int, int] | None, ...]


@dataclass
class WatchedFiles:
    """Files that belong together. `reload` reads them; what it raises is logged and counted, the same of the
    same files once, and what was read before goes on.
    """

    what: str
    paths: Sequence[Path]
    reload: Callable[[], None]
    num_reloads: int = 0
    num_failures: int = 0
    _seen: _Signature = field(init=False)
    _problem: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._seen = self._signature()

    def poll(self, *, is_forced: bool = False) -> None:
        """Reload if a file is another one than it was, if the last time failed, or if told to."""
        # Taken before the files are read: what changes meanwhile is seen the next time.
        signature = self._signature()
        is_known = signature == self._seen and not is_forced
        if is_known and not self._problem:
            return
        self._seen = signature
        try:
            self.reload()
        except (OSError, ValueError) as error:
            problem = str(error) or type(error).__name__
            if is_known and problem == self._problem:
                return
            self._problem = problem
            self.num_failures += 1
            log.error("not reloaded, the old one stays", what=self.what, reason=problem)
        else:
            self._problem = ""
            self.num_reloads += 1
            log.info("reloaded", what=self.what)

    def _signature(self) -> _Signature:
        return tuple(map(_stat, self.paths))


def _stat(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # The time of a change of its rights, too: a file that may be read now has changed.
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


@contextlib.contextmanager
def _on_hangup(nudge: Callable[[], None]) -> Iterator[None]:
    """SIGHUP calls `nudge`, where signals can be had."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGHUP, nudge)
    except (RuntimeError, ValueError, NotImplementedError):  # not the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def watch(files: Sequence[WatchedFiles], interval_s: float) -> None:
    """Poll every `interval_s` seconds, and all of them at a SIGHUP. Runs until cancelled."""
    nudged = asyncio.Event()
    with _on_hangup(nudged.set):
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await nudged.wait()
            is_forced = nudged.is_set()
            nudged.clear()
            for each in files:
                # In a thread: a volume that hangs must not hold the event loop.
                await asyncio.to_thread(each.poll, is_forced=is_forced)
