"""Many logical requests on one client connection: the Multiplex call. Each fails or ends on its own.

A client that does not read holds up its call and nothing else: its requests are given up in their time, and
only their short ends wait to be written.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from services.gateway.events import responses, started
from services.gateway.gateway import Gateway
from services.gateway.ownership import refuse_fields_that_need_an_owner
from services.gateway.resolution import refuse_unknown_fields
from services.gateway.streams.mailbox import Mailbox
from services.gateway.streams.reader import Reader
from weft import logs
from weft.rpc.auth import Caller, check_method
from weft.rpc.errors import StatusError, failure_from, internal_error, invalid_argument, new_error_id
from weft.v1 import gateway_service_pb2 as pb

MAX_STREAMS = 1024
log = logs.get_logger("gateway")
Write = Callable[[pb.MultiplexResponse], Awaitable[None]]


class _Stream:
    """One logical request, and its reader once there is one."""

    def __init__(self) -> None:
        self.reader: Reader | None = None
        self.is_cancelled = False


class ClientStreams:
    """The logical requests of one Multiplex call."""

    def __init__(
        self,
        gateway: Gateway,
        write: Write,
        *,
        caller: Caller,
        budget_s: float | None,
        num_processes: int = 1,
    ) -> None:
        self._gateway = gateway
        self._num_processes = num_processes
        self._mailbox: Mailbox[pb.MultiplexResponse] = Mailbox(write)
        self._caller = caller
        self._until = None if budget_s is None else gateway.now() + budget_s
        self._streams: dict[int, _Stream] = {}
        # A task is here until its `end` is written, which is after its id has come free.
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, requests: AsyncIterator[pb.MultiplexRequest]) -> None:
        """Serve until the client sends no more and every request has ended. Leaving cancels the rest."""
        writing = asyncio.create_task(self._mailbox.run())
        try:
            async for request in requests:
                await self._command(request)
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            tasks = [*self._tasks, writing]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _command(self, request: pb.MultiplexRequest) -> None:
        stream_id = request.stream_id
        stream = self._streams.get(stream_id)
        try:
            self._check(request, stream)
        except StatusError as error:
            if stream is not None:
                # An end event for a live id would end the wrong request, so the whole call ends.
                raise
            await self._end(stream_id, error)
            return
        if request.WhichOneof("command") == "cancel":
            # An unknown id is a cancel that crossed the end of its request.
            if stream is not None:
                stream.is_cancelled = True
                if stream.reader is not None:
                    stream.reader.cancel()
            return
        stream = self._streams[stream_id] = _Stream()
        task = asyncio.create_task(self._serve(stream_id, stream, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check(self, request: pb.MultiplexRequest, stream: _Stream | None) -> None:
        refuse_unknown_fields(request)
        command = request.WhichOneof("command")
        if command is None:
            raise invalid_argument([("command", "generate or cancel must be set")])
        if command == "cancel":
            if request.HasField("budget_ms"):
                raise invalid_argument([("budget_ms", "belongs to generate")])
            return
        if stream is not None:
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"stream {request.stream_id} is live: this call is over",
                reason="STREAM_ID_IN_USE",
            )
        refuse_fields_that_need_an_owner(request.generate, self._num_processes)
        if len(self._tasks) >= MAX_STREAMS:
            raise self._gateway.admission.refusal(f"more than {MAX_STREAMS} requests on one stream")

    def _budget_s(self, request: pb.MultiplexRequest) -> float | None:
        own = request.budget_ms / 1000 if request.HasField("budget_ms") else None
        rest = None if self._until is None else self._until - self._gateway.now()
        return min((b for b in (own, rest) if b is not None), default=None)

    async def _serve(self, stream_id: int, stream: _Stream, request: pb.MultiplexRequest) -> None:
        failure: StatusError | None = None
        try:
            await self._generate(stream_id, stream, request)
        except StatusError as error:
            failure = error
        except grpc.aio.BaseError:
            return  # the client is gone; the call's own task says so
        except Exception as error:  # one request must not end the others
            error_id = new_error_id()
            log.failure("unhandled exception", error, error_id=error_id)
            failure = internal_error(error_id)
        finally:
            del self._streams[stream_id]
        with contextlib.suppress(grpc.aio.BaseError):
            await self._end(stream_id, failure)

    async def _generate(self, stream_id: int, stream: _Stream, request: pb.MultiplexRequest) -> None:
        # The key of a call that has long been open may have lost the method since.
        caller = self._gateway.renew(self._caller)
        check_method(caller, "Multiplex")
        budget_s = self._budget_s(request)
        opened = self._gateway.open(request.generate, caller=caller, budget_s=budget_s)
        async with opened as reader:
            stream.reader = reader
            if stream.is_cancelled:
                reader.cancel()
            await reader.admitted()
            resolved = reader.resolved
            reader.writing()
            await self._send(stream_id, started(resolved))
            while (updates := await reader.take_updates()) is not None:
                for update in updates:
                    first, *rest = responses(resolved, update)
                    await self._send(stream_id, first)
                    reader.sending(update)
                    for response in rest:
                        await self._send(stream_id, response)

    async def _send(self, stream_id: int, response: pb.GenerateResponse) -> None:
        await self._mailbox.put(pb.MultiplexResponse(stream_id=stream_id, response=response))

    async def _end(self, stream_id: int, failure: StatusError | None) -> None:
        end = pb.StreamEnd(failure=failure_from(failure) if failure is not None else None)
        await self._mailbox.put_last(pb.MultiplexResponse(stream_id=stream_id, end=end))
