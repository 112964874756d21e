"""A small service with all four kinds of call, hand-made handlers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

# Any message type does for a probe; this one has a string field, so bytes that are no UTF-8 can be sent.
Probe = health_pb2.HealthCheckRequest
SERVICE = "test.v1.ProbeService"


class ProbeService:
    """Four methods that do what the test says. `act(name)` runs inside each, before the answer."""

    def __init__(self) -> None:
        self.act: Callable[[str], Any] = lambda name: None
        self.num_live = 0
        self.entered = asyncio.Event()

    @contextlib.contextmanager
    def live(self) -> Any:
        self.num_live += 1
        self.entered.set()
        try:
            yield
        finally:
            self.num_live -= 1

    async def _act(self, name: str) -> None:
        outcome = self.act(name)
        if asyncio.iscoroutine(outcome):
            await outcome

    async def unary_unary(self, request: Any, context: Any) -> Any:
        with self.live():
            await self._act(request.service)
            return Probe(service=request.service)

    async def unary_stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        with self.live():
            await self._act(request.service)
            yield Probe(service=request.service)
            if request.service == "forever":
                while True:
                    yield Probe(service="x" * 1000)

    async def stream_unary(self, requests: Any, context: Any) -> Any:
        with self.live():
            async for request in requests:
                await self._act(request.service)
            return Probe(service="done")

    async def stream_stream(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        with self.live():
            async for request in requests:
                await self._act(request.service)
                yield Probe(service=request.service)

    async def wrong(self, request: Any, context: Any) -> Any:
        return "no message"

    def register(self, server: grpc.aio.Server) -> None:
        """Add the four methods under the names of their kinds, and one that is wrong."""
        make = {
            "unary_unary": grpc.unary_unary_rpc_method_handler,
            "unary_stream": grpc.unary_stream_rpc_method_handler,
            "stream_unary": grpc.stream_unary_rpc_method_handler,
            "stream_stream": grpc.stream_stream_rpc_method_handler,
            "wrong": grpc.unary_unary_rpc_method_handler,
        }
        handlers = {
            name: kind(
                getattr(self, name),
                request_deserializer=Probe.FromString,
                response_serializer=Probe.SerializeToString,
            )
            for name, kind in make.items()
        }
        server.add_registered_method_handlers(SERVICE, handlers)  # type: ignore[attr-defined]
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


async def eventually(is_true: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait until a condition holds; fail when it does not in time."""
    for _ in range(int(within_s / 0.01)):
        if is_true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true in time")


async def call_kind(
    channel: Any, kind: str, *payloads: bytes, metadata: Any = None, seconds: float = 10
) -> list[Any]:
    """Call one of the four methods with raw payloads and return the messages that came back."""
    multicallable = getattr(channel, kind)(f"/{SERVICE}/{kind}", None, Probe.FromString)
    request: Any = iter(payloads) if kind.startswith("stream") else payloads[0]
    call = multicallable(request, metadata=metadata, timeout=seconds)
    if kind.endswith("unary"):
        return [await call]
    return [message async for message in call]
