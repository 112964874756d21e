"""A TCP proxy whose network can be broken: black hole, reset, slices, delay.

Runs on the caller's event loop. Knows bytes and connections; no protocol, no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

from weft.rpc.address import Address, parse_address

CHUNK_BYTES = 1 << 16
# Linger for zero seconds: closing then sends a reset.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """`async with Proxy("127.0.0.1:7000") as proxy:` forwards what comes to `proxy.address`.

    `target` may be changed at any time: new connections go there. With `slice_bytes` every read is handed on
    in pieces of that size; `delay_s` is waited before each read is handed on; `cut_after_bytes` resets a
    connection once so many bytes have come from the target.
    """

    def __init__(self, target: Address | str) -> None:
        self.target = parse_address(target) if isinstance(target, str) else target
        self.address = Address("127.0.0.1", 0)
        self.slice_bytes: int | None = None
        self.delay_s = 0.0
        self.cut_after_bytes: int | None = None
        self.num_connections = 0
        self._up, self._down = asyncio.Event(), asyncio.Event()
        self.heal()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen on a free port of the loopback address."""
        self._server = await asyncio.start_server(self._on_connection, self.address.host, self.address.port)
        port = self._server.sockets[0].getsockname()[1]
        self.address = self.address._replace(port=port)

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server = None

    def black_hole(self, *, up: bool = True, down: bool = True) -> None:
        """Nothing goes up to the target, or down from it, any more, and nobody is told. New connections are
        made, by the system, and stay silent.
        """
        if up:
            self._up.clear()
        if down:
            self._down.clear()

    def heal(self) -> None:
        """Everything goes through again, what was held back first."""
        self._up.set()
        self._down.set()

    def make_well(self) -> None:
        """As at the start: nothing is held back, sliced, delayed or cut."""
        self.slice_bytes = self.cut_after_bytes = None
        self.delay_s = 0.0
        self.heal()

    def reset(self) -> None:
        """Break off every connection with a reset."""
        for writer in list(self._writers):
            _reset(writer)

    async def __aenter__(self) -> Proxy:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, both ways, until either side ends it."""
        self.num_connections += 1
        self._writers.add(writer)
        far_writer: asyncio.StreamWriter | None = None
        try:
            await self._up.wait()
            far_reader, far_writer = await asyncio.open_connection(*self.target)
            self._writers.add(far_writer)
            left = self.cut_after_bytes

            def count(num_bytes: int) -> int | None:
                """How many of these bytes may pass; None: all."""
                nonlocal left
                if left is None:
                    return None
                passed = min(left, num_bytes)
                left -= passed
                return passed

            ways = [
                asyncio.ensure_future(self._pump(reader, far_writer, self._up, lambda _: None)),
                asyncio.ensure_future(self._pump(far_reader, writer, self._down, count)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            _reset(writer)  # the target is gone: its own refusal, handed on
        finally:
            for end in (writer, far_writer):
                if end is not None:
                    self._writers.discard(end)
                    end.close()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        is_open: asyncio.Event,
        allowed: Callable[[int], int | None],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                passed = allowed(len(data))
                size = self.slice_bytes or len(data)
                whole = data if passed is None else data[:passed]
                for start in range(0, len(whole), size):
                    await is_open.wait()
                    writer.write(whole[start : start + size])
                    await writer.drain()
                    if size < len(whole):
                        await asyncio.sleep(0)  # so that each slice travels by itself
                if passed is not None and passed < len(data):
                    _reset(writer)
                    return


def _reset(writer: asyncio.StreamWriter) -> None:
    """Abort a connection so that its peer sees a reset."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
