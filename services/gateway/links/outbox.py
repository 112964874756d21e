"""Commands to an engine, in order, from whoever sends to the one task that writes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

import grpc

from weft.v1 import engine_service_pb2 as engine_pb


class LinkOutbox:
    """Bounded by what is live: a few commands for each slot."""

    def __init__(self) -> None:
        self._commands: deque[engine_pb.ConnectRequest] = deque()
        self._has_mail = asyncio.Event()

    def send(self, command: engine_pb.ConnectRequest) -> None:
        """Queue a command. Never blocks."""
        self._commands.append(command)
        self._has_mail.set()

    def clear(self) -> None:
        """Forget what a session that ended left behind."""
        self._commands.clear()

    async def write(self, call: Any) -> None:
        """Write until cancelled. A write that fails is a stream that ended, and the reader says why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                while self._commands:
                    await call.write(self._commands.popleft())
                self._has_mail.clear()
                await self._has_mail.wait()
        await asyncio.get_running_loop().create_future()
