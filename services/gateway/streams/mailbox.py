"""Messages of many requests on their way into one call. Order is kept; what waits is bounded.

Whoever puts a message in may be torn away at any moment without harm to the call: only the mailbox's own
task is ever inside a write. Knows nothing of what the messages are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from google.protobuf.message import Message

MAX_BYTES = 32 << 10

M = TypeVar("M", bound=Message)


class Mailbox(Generic[M]):
    """`run` writes what is `put`, until cancelled or a write fails. Then `put` and `put_last` raise what the
    write raised.
    """

    def __init__(self, write: Callable[[M], Awaitable[None]]) -> None:
        self._write = write
        self._messages: deque[tuple[M, int, asyncio.Future[None] | None]] = deque()
        self._num_bytes = 0
        self._error: BaseException | None = None
        # Putters in order of arrival; the first of them waits for room.
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._mail = asyncio.Event()

    async def put(self, message: M) -> None:
        """Hand a message over, once there is room for it."""
        async with self._turn:
            await self._post(message, None)

    async def put_last(self, message: M) -> None:
        """Hand a message over and return when its write is done."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with self._turn:
            await self._post(message, written)
        await written

    async def _post(self, message: M, written: asyncio.Future[None] | None) -> None:
        while self._num_bytes >= MAX_BYTES and self._error is None:
            self._room.clear()
            await self._room.wait()
        if self._error is not None:
            raise self._error
        size = message.ByteSize()
        self._num_bytes += size
        self._messages.append((message, size, written))
        self._mail.set()

    async def run(self) -> None:
        """Write, in order."""
        try:
            while True:
                while self._messages:
                    message, size, written = self._messages[0]
                    await self._write(message)
                    self._messages.popleft()
                    self._num_bytes -= size
                    if written is not None and not written.done():
                        written.set_result(None)
                    self._room.set()
                self._mail.clear()
                await self._mail.wait()
        except BaseException as error:
            self._error = error
            raise
        finally:
            for _, _, written in self._messages:
                if written is None or written.done():
                    continue
                if isinstance(self._error, Exception):
                    written.set_exception(self._error)
                else:
                    written.cancel()
            self._messages.clear()
            self._room.set()
