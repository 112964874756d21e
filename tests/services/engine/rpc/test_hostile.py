"""Bytes that nobody should send, on every method and on the bare connection. The engine goes on."""

from __future__ import annotations

import asyncio
import contextlib
import random

import grpc
import pytest

from tests.services.engine.rpc.harness import expected, linked, running_engine, sampling, submit
from weft.v1 import engine_service_pb2 as pb

PROMPT = [3, 1, 4, 1, 5]
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["EngineService"].methods]
ALLOWED = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED"}


def seeds() -> list[bytes]:
    """Good messages to spoil."""
    hello = pb.ConnectRequest(hello=pb.GatewayHello(protocol_version=1, initial_credit_bytes=1 << 20))
    return [
        hello.SerializeToString(),
        submit(1, PROMPT, 5).SerializeToString(),
        pb.ConnectRequest(update=pb.Update(slot=1, priority=3, budget_ms=5)).SerializeToString(),
        pb.GenerateTokensRequest(
            prompt_token_ids=PROMPT, sampling=sampling(5, logprobs=3)
        ).SerializeToString(),
    ]


def spoiled(rng: random.Random) -> bytes:
    data = bytearray(rng.choice(seeds()))
    for _ in range(rng.randrange(4)):
        what, at = rng.randrange(4), rng.randrange(len(data) + 1)
        if what == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif what == 1:
            data[at:at] = rng.randbytes(rng.randrange(6))
        elif what == 2:
            del data[at : at + rng.randrange(6)]
        else:
            data += rng.choice(seeds())[:at]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
async def test_spoiled_messages_on_every_method(seed):
    rng = random.Random(seed)
    async with running_engine() as engine, linked(engine) as bystander:
        for _ in range(150):
            # A good Drain would end the test for everybody else.
            method = rng.choice([name for name in METHODS if name != "Drain"])
            # Where one message is due, the library itself answers a second one.
            payloads = [spoiled(rng) for _ in range(rng.randrange(1, 4) if method == "Connect" else 1)]
            if method == "Connect" and rng.random() < 0.7:
                payloads.insert(0, seeds()[0])
            call = engine.channel.stream_stream(f"/weft.v1.EngineService/{method}")(iter(payloads), timeout=2)
            with contextlib.suppress(grpc.aio.AioRpcError):
                for _ in range(rng.randrange(1, 12)):
                    if await call.read() is grpc.aio.EOF:
                        break
            call.cancel()
        await bystander.call.write(submit(0, PROMPT, 50))
        await bystander.read_until(lambda: bystander.finished)
        assert bystander.tokens[0] == expected(PROMPT, 50)
        # What the server sent: a client still writing when its call ends reports an error of its own.
        assert set(engine.server.counters.by_code) <= ALLOWED
        assert engine.server.counters.by_code["INVALID_ARGUMENT"] > 20


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9) * 1_000,
        random.Random(1).randbytes(10_000),
    ],
    ids=range(6),
)
async def test_garbage_on_the_connection(data):
    async with running_engine() as engine:
        for is_abrupt in (False, True):
            reader, writer = await asyncio.open_connection(*engine.server.address)
            writer.write(data)
            if is_abrupt:
                writer.transport.abort()
                continue
            with contextlib.suppress(OSError):  # the server may have hung up already
                writer.write_eof()
                async with asyncio.timeout(10):
                    while await reader.read(1 << 16):
                        pass
            writer.close()
        assert await engine.stub.GetInfo(pb.GetInfoRequest()) == engine.info


async def test_a_huge_prompt_is_refused_quickly():
    async with running_engine() as engine, linked(engine) as gateway:
        started = asyncio.get_running_loop().time()
        await gateway.call.write(submit(0, [1] * 4_000_000))
        await gateway.read_until(lambda: gateway.rejected)
        assert asyncio.get_running_loop().time() - started < 2
        await gateway.call.write(submit(0, PROMPT))
        await gateway.read_until(lambda: gateway.finished)


async def test_unknown_fields_are_ignored_by_this_version():
    async with running_engine() as engine, linked(engine) as gateway:
        data = submit(0, PROMPT).SerializeToString() + b"\xfa\x7f\x03abc"
        await gateway.call.write(pb.ConnectRequest.FromString(data))
        await gateway.read_until(lambda: gateway.finished)
        assert gateway.tokens[0] == expected(PROMPT, 5)
