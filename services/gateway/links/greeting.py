"""The first two messages of a link: this gateway's Hello, and the engine's."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from services.gateway.links.multiplexer import ProtocolViolation
from services.gateway.links.terms import EngineRefused, LinkLost
from weft.v1 import engine_service_pb2 as engine_pb

PROTOCOL_VERSION = 1
# The library's mark for the end of a stream; its type stubs do not know it.
EOF: Any = vars(grpc.aio)["EOF"]


async def greet(call: Any, gateway_id: str, credit_bytes: int, timeout_s: float) -> engine_pb.EngineHello:
    """The engine's Hello on a stream that has just begun. Raises LinkLost, ProtocolViolation, or
    EngineRefused for an engine that this gateway cannot use.
    """
    hello = engine_pb.GatewayHello(
        protocol_version=PROTOCOL_VERSION, gateway_id=gateway_id, initial_credit_bytes=credit_bytes
    )
    try:
        async with asyncio.timeout(timeout_s):
            # A call that failed already cannot be written to; the read says why it failed.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(engine_pb.ConnectRequest(hello=hello))
            response = await call.read()
    except TimeoutError:
        raise LinkLost("no Hello came") from None
    if response is EOF:
        raise LinkLost("the engine ended the stream before its Hello")
    if response.WhichOneof("event") != "hello":
        raise ProtocolViolation("the first message is no Hello")
    answer: engine_pb.EngineHello = response.hello
    if answer.protocol_version != PROTOCOL_VERSION:
        raise EngineRefused(f"it speaks version {answer.protocol_version} of the link's protocol")
    if answer.info.vocab_size < 1 or answer.info.max_model_len < 2:
        raise EngineRefused("it has no vocabulary or no context")
    return answer
