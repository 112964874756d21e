"""A service as a process whose every line is kept, for tests of what it says and whom it calls."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "models" / "demo"


class GuardProcess:
    """`python -m MODULE serve FLAGS`. Standard error is read as it comes; `lines` holds all of it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[bytes] = []
        self._more = asyncio.Event()
        self._num_seen = 0
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, module: str, *flags: object, environment: dict[str, str] | None = None
    ) -> GuardProcess:
        """Start a process, with another environment than this one's if given."""
        variables = {**(environment or os.environ), "PYTHONPATH": str(ROOT)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, "serve", *map(str, flags)),
            cwd=ROOT, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env=variables,
        )  # fmt: skip
        return cls(process)

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await read_line(self.process.stderr):
            self.lines.append(line)
            self._more.set()
        self._more.set()

    async def wait_for(self, event: str, timeout_s: float = 40.0) -> dict[str, Any]:
        """The next event of this name, which may have come already."""
        async with asyncio.timeout(timeout_s):
            while True:
                while self._num_seen < len(self.lines):
                    self._num_seen += 1
                    found: dict[str, Any] = json.loads(self.lines[self._num_seen - 1])
                    if found["event"] == event:
                        return found
                if self._reader.done():
                    raise AssertionError(f"no {event!r} in {self.lines}")
                self._more.clear()
                await self._more.wait()

    def send(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def end(self) -> int:
        """End it with SIGTERM, and read what is left."""
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(20):
                code = await self.process.wait()
        except TimeoutError:
            self.process.kill()
            code = await self.process.wait()
        await self._reader
        return code


async def read_line(stream: asyncio.StreamReader) -> bytes:
    """One line of any length."""
    pieces = []
    while True:
        try:
            return b"".join([*pieces, await stream.readuntil(b"\n")])
        except asyncio.LimitOverrunError as error:
            pieces.append(await stream.readexactly(error.consumed))
        except asyncio.IncompleteReadError as error:
            return b"".join([*pieces, error.partial])
