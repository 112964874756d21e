"""Requests over gRPC, many on one stream: `weft.v1.GatewayService.Multiplex`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from cli.bench.grpc_transport import GrpcTransport, finished, take
from cli.bench.records import CANCELLED, FAILED, INTERRUPTED
from cli.bench.settings import Settings
from cli.bench.transport import Exchange, now
from weft.rpc.auth import auth_metadata
from weft.v1 import gateway_service_pb2 as pb

_EOF: Any = vars(grpc.aio)["EOF"]
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class MultiplexTransport(GrpcTransport):
    """One stream for each connection; requests take the streams in turn."""

    def __init__(self, settings: Settings, concurrency: int) -> None:
        super().__init__(settings, concurrency)
        self._streams: list[_Stream] = []
        self._next = 0

    async def run(self, exchange: Exchange) -> None:
        """One logical request."""
        metadata = auth_metadata(self._settings.server.api_key)
        if not self._streams:
            # Opened by the first request, inside of the run: a stream belongs to whom its key does.
            self._streams = [_Stream(stub.Multiplex(metadata=metadata)) for stub in self.stubs]
        self._next += 1
        place = self._next % len(self._streams)
        if self._streams[place].is_over:  # the server has ended it, and may be there again
            self._streams[place] = _Stream(self.stubs[place].Multiplex(metadata=metadata))
        stream = self._streams[place]
        await stream.run(self.request(exchange), exchange, self._settings.timeout_s)

    async def close(self) -> None:
        """End the streams, then the connections."""
        for stream in self._streams:
            await stream.close()
        await super().close()


class _Stream:
    def __init__(self, call: Any) -> None:
        self._call = call
        self._count = 0
        self._waiting: dict[int, tuple[Exchange, asyncio.Future[None]]] = {}
        # Two writes may not overlap.
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    @property
    def is_over(self) -> bool:
        """Whether it takes no more requests."""
        return self._reader.done() or self._call.done()

    async def run(self, request: pb.GenerateRequest, exchange: Exchange, timeout_s: float) -> None:
        self._count += 1
        stream_id, record = self._count, exchange.record
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[stream_id] = exchange, done
        record.sent = now()
        message = pb.MultiplexRequest(
            stream_id=stream_id, generate=request, budget_ms=max(1, int(timeout_s * 1000))
        )
        try:
            await self._write(message)
            # The budget is the server's to keep; this is for a server that does not.
            async with asyncio.timeout(timeout_s + 10.0):
                await done
        except asyncio.CancelledError:
            record.ended(now(), INTERRUPTED)
            raise
        except TimeoutError:
            record.ended(now(), FAILED, "DEADLINE_EXCEEDED", "no end came")
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            record.ended(now(), FAILED, "UNAVAILABLE", f"the stream has ended: {type(error).__name__}")
        finally:
            if self._waiting.pop(stream_id, None) is not None and not self._reader.done():
                cancel = pb.MultiplexRequest(stream_id=stream_id, cancel=pb.CancelStream())
                with contextlib.suppress(Exception):
                    await self._write(cancel)

    async def close(self) -> None:
        self._call.cancel()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
            await self._reader

    async def _write(self, message: pb.MultiplexRequest) -> None:
        async with self._writing:
            await self._call.write(message)

    async def _read(self) -> None:
        status, reason = "UNAVAILABLE", "the stream has ended"
        try:
            while (message := await self._call.read()) is not _EOF:
                self._take(message)
            code = await self._call.code()
            status = "INCOMPLETE" if code is grpc.StatusCode.OK else code.name
            reason = await self._call.details() or reason
        except grpc.aio.AioRpcError as error:
            status, reason = error.code().name, error.details() or reason
        finally:
            for exchange, done in list(self._waiting.values()):
                exchange.record.ended(now(), FAILED, status, reason)
                if not done.done():
                    done.set_result(None)

    def _take(self, message: pb.MultiplexResponse) -> None:
        exchange, done = self._waiting.get(message.stream_id, (None, None))
        if exchange is None or done is None or done.done():
            return  # what was on its way when the request was cancelled
        record, at = exchange.record, now()
        if message.WhichOneof("event") == "response":
            if take(record, message.response, at):
                # The cancel itself is sent by `run`, which still finds it waiting.
                record.ended(at, CANCELLED)
                done.set_result(None)
            return
        if message.end.HasField("failure"):
            failure = message.end.failure
            name = _CODES.get(failure.code, str(failure.code))
            reason = f"{failure.reason}: {failure.message}" if failure.reason else failure.message
            record.ended(at, FAILED, name, reason)
        elif record.finish:
            finished(record, at)
        else:
            record.ended(at, FAILED, "INCOMPLETE", "the request ended without a finish")
        self._waiting.pop(message.stream_id)
        done.set_result(None)
