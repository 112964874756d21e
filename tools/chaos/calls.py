"""How a client's request travels over gRPC: a Generate call of its own, or one of many on a Multiplex call.

Knows messages and calls; does not know what is asked or what should come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from weft.rpc.errors import StatusError, error_from_call, error_from_failure
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

# The library's mark for the end of a stream; its type stubs do not know it.
_EOF: Any = vars(grpc.aio)["EOF"]
CALL_TIMEOUT_S = 120.0
LOCAL = [("grpc.use_local_subchannel_pool", 1)]


async def generate_events(
    stub: GatewayServiceStub, request: pb.GenerateRequest
) -> AsyncIterator[pb.GenerateResponse]:
    """The events of a Generate call. Raises StatusError; leaving cancels."""
    call = stub.Generate(request, timeout=CALL_TIMEOUT_S)
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise error_from_call(error) from None
    finally:
        call.cancel()


class MultiplexClient:
    """Many requests on one Multiplex call, opened with the first of them."""

    def __init__(self, stub: GatewayServiceStub) -> None:
        self._stub = stub
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._queues: dict[int, asyncio.Queue[pb.MultiplexResponse | StatusError]] = {}
        self._next_id = 0
        self._lock = asyncio.Lock()

    async def events(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        """The events of one request. Raises StatusError; leaving cancels it."""
        if self._reader is None or self._reader.done():
            self._call = self._stub.Multiplex()
            self._reader = asyncio.create_task(self._read(self._call))
        self._next_id += 1
        stream_id = self._next_id
        # As many events as the client's own request can have: what is not taken in time waits here.
        queue = self._queues[stream_id] = asyncio.Queue()
        is_over = False
        try:
            try:
                await self._write(pb.MultiplexRequest(stream_id=stream_id, generate=request))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                raise StatusError(grpc.StatusCode.UNAVAILABLE, f"the call is over: {error}") from None
            while True:
                response = await queue.get()
                if isinstance(response, StatusError):
                    is_over = True
                    raise response
                if response.WhichOneof("event") == "end":
                    is_over = True
                    if response.end.HasField("failure"):
                        raise failure_of(response.end.failure)
                    return
                yield response.response
        finally:
            # What still comes of it, `_read` drops.
            del self._queues[stream_id]
            if not is_over:
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await self._write(pb.MultiplexRequest(stream_id=stream_id, cancel=pb.CancelStream()))

    async def close(self) -> None:
        """End the call."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _write(self, request: pb.MultiplexRequest) -> None:
        async with self._lock:
            await self._call.write(request)

    async def _read(self, call: Any) -> None:
        try:
            while (response := await call.read()) is not _EOF:
                queue = self._queues.get(response.stream_id)
                if queue is not None:
                    queue.put_nowait(response)
            error = StatusError(grpc.StatusCode.UNAVAILABLE, "the Multiplex call ended")
        except grpc.aio.AioRpcError as rpc_error:
            error = error_from_call(rpc_error)
        for queue in self._queues.values():
            queue.put_nowait(error)


def failure_of(failure: generation_pb2.Failure) -> StatusError:
    """A failure inside a stream as the error of a call, its resume token with it."""
    error = error_from_failure(failure)
    if failure.resume_token:
        error.metadata.setdefault("resume_token", failure.resume_token)
    return error
