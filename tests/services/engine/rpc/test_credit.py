"""Frames under credit: coalesced, never lost, never overdrawn, and bounded."""

from __future__ import annotations

import asyncio

import grpc

from tests.services.engine.rpc.harness import (
    ends_with,
    eventually,
    expected,
    linked,
    running_engine,
    sampling,
    submit,
)
from weft.v1 import engine_service_pb2 as pb

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


async def test_without_credit_frames_wait_and_then_come_together():
    async with running_engine() as engine, linked(engine, credit=0) as gateway:
        for slot in range(3):
            await gateway.call.write(submit(slot, [slot, *PROMPT], 200))
        await eventually(lambda: engine.core.report().counters.generation_tokens == 600)
        await asyncio.sleep(0.1)
        await gateway.read_until(lambda: len(gateway.accepted) == 3)
        await gateway.send(credit=pb.FrameCredit(bytes=1 << 20))
        await gateway.read_until(lambda: len(gateway.finished) == 3)
        assert len(gateway.frames) == 1
        for slot in range(3):
            assert gateway.tokens[slot] == expected([slot, *PROMPT], 200)


async def test_heartbeats_go_on_while_an_end_waits_for_credit():
    """A gateway that still waits for an end takes silence for death."""
    async with running_engine() as engine, linked(engine, credit=0) as gateway:
        await gateway.call.write(submit(0, PROMPT, 3))
        await eventually(lambda: engine.core.report().counters.ended == 1)
        before = len(gateway.heartbeats)
        await gateway.read_until(lambda: len(gateway.heartbeats) >= before + 3, within_s=3)
        await gateway.send(credit=pb.FrameCredit(bytes=1 << 20))
        await gateway.read_until(lambda: gateway.finished)


async def test_credit_is_never_overdrawn_and_nothing_is_lost_in_drips():
    async with running_engine() as engine, linked(engine, credit=100) as gateway:
        granted = 100
        await gateway.call.write(submit(0, PROMPT, sampling=sampling(50, logprobs=2)))
        while not gateway.finished:
            try:
                await asyncio.wait_for(asyncio.shield(reading := asyncio.ensure_future(gateway.read())), 0.05)
            except TimeoutError:
                granted += 150
                await gateway.send(credit=pb.FrameCredit(bytes=150))
                await reading
            assert sum(frame.ByteSize() for frame in gateway.frames) <= granted
        assert gateway.tokens[0] == expected(PROMPT, 50)


async def test_credit_beyond_all_numbers_does_not_overflow():
    async with running_engine() as engine, linked(engine, credit=2**64 - 1) as gateway:
        await gateway.send(credit=pb.FrameCredit(bytes=2**64 - 1))
        await gateway.call.write(submit(0, PROMPT))
        await gateway.read_until(lambda: gateway.finished)


async def test_a_link_that_never_gives_credit_is_dropped_and_its_sequences_cancelled(monkeypatch):
    monkeypatch.setattr("services.engine.rpc.outbox.MAX_PENDING_BYTES", 2_000)
    async with running_engine() as engine, linked(engine, credit=0) as gateway, linked(engine) as other:
        await other.call.write(submit(0, PROMPT, 400))
        for slot in range(4):
            await gateway.call.write(submit(slot, PROMPT, 1_900))
        assert (await ends_with(gateway.call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await eventually(lambda: engine.core.num_live <= 1)
        await other.read_until(lambda: other.finished)
        assert other.tokens[0] == expected(PROMPT, 400)


async def test_a_link_with_credit_that_does_not_read_is_dropped_too(monkeypatch):
    monkeypatch.setattr("services.engine.rpc.outbox.MAX_PENDING_BYTES", 20_000)
    async with running_engine() as engine:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        async with grpc.aio.insecure_channel(str(engine.server.address), options=options) as channel:
            engine.stub = type(engine.stub)(channel)
            engine.runner.step_s = 0.2  # No link ends before all is written.
            async with linked(engine) as gateway:
                for slot in range(40):
                    await gateway.call.write(submit(slot, [slot], sampling=sampling(1_900, logprobs=20)))
                await eventually(lambda: engine.loop.load().counters.begun == 40)
                engine.runner.step_s = 0
                await eventually(lambda: not engine.core.num_live and not engine.servicer._links, within_s=10)
