"""Runs a job as a child: `python -m services.quantizer run` behind a guardian that ends it when the service
does. Knows nothing of what the lines say.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from services.quantizer.config import ENV_PREFIX
from services.quantizer.jobs.runner import MAX_LINE_CHARS, Ended, StartFailed, Task
from services.quantizer.jobs.spec import Places
from weft.config import environment_without, flags_of

_GUARDIAN = Path(__file__).with_name("guardian.py")
_IMPORT_ROOT = Path(__file__).resolve().parents[3]
_CHUNK_BYTES = 1 << 16
_PATIENCE_S = 5.0


class ProcessRunner:
    """One process group per run. `grace_s` lies between SIGTERM and SIGKILL."""

    def __init__(self, places: Places, grace_s: float) -> None:
        self.places = places
        self._grace_s = grace_s

    async def start(self, task: Task) -> ProcessRun:
        """Begin. Raises StartFailed."""
        command = [
            *(sys.executable, "-I", "-S", str(_GUARDIAN), f"{self._grace_s:g}"),
            *(sys.executable, "-m", "services.quantizer", "run"),
            *flags_of(task.options),
            f"--fencing-token={task.token}",
        ]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=_IMPORT_ROOT,
                # A variable that is meant for the service must not change what a job asked for.
                env=environment_without(ENV_PREFIX),
                start_new_session=True,
            )
        except OSError as error:
            raise StartFailed(f"cannot start a process: {error}") from error
        return ProcessRun(process, self._grace_s)

    async def remove_leftovers(self, is_live: Callable[[str, int], bool]) -> None:
        """Nothing: a guardian ends its run when the service is gone."""

    async def close(self) -> None:
        """Nothing is held."""


class ProcessRun:
    """A child at work."""

    def __init__(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        self._process = process
        self._grace_s = grace_s
        self._output = asyncio.ensure_future(_first_line(process.stdout))

    async def lines(self) -> AsyncIterator[str]:
        """Its standard error, line by line."""
        async for line in split_lines(self._process.stderr):
            yield line

    async def wait(self) -> Ended:
        """Its end."""
        first_line = await self._output
        return Ended(await self._process.wait(), first_line)

    async def stop(self) -> None:
        """Pull the leash; a guardian that does not let go of the run is killed, and the run with it."""
        stdin = self._process.stdin
        if stdin is not None:
            stdin.close()
        try:
            async with asyncio.timeout(self._grace_s + _PATIENCE_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


async def split_lines(stream: asyncio.StreamReader | None) -> AsyncIterator[str]:
    """The lines of a stream, each clipped to MAX_LINE_CHARS; a line of any length costs no more memory."""
    pending = b""
    while stream is not None and (data := await stream.read(_CHUNK_BYTES)):
        *whole, pending = (pending + data).split(b"\n")
        for line in whole:
            yield line[: 4 * MAX_LINE_CHARS].decode("utf-8", "replace")[:MAX_LINE_CHARS]
        pending = pending[: 4 * MAX_LINE_CHARS]
    if pending:
        yield pending.decode("utf-8", "replace")[:MAX_LINE_CHARS]


async def _first_line(stream: asyncio.StreamReader | None) -> str:
    """The first line; the rest is read and dropped, so that the child never waits."""
    first: str | None = None
    async for line in split_lines(stream):
        first = line if first is None else first
    return first or ""
