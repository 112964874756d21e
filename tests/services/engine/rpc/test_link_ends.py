"""How links and their sequences end: disconnects, failures, drains, a lost device."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.services.engine.rpc.harness import (
    CODES,
    ends_with,
    eventually,
    expected,
    linked,
    running_engine,
    sampling,
    submit,
)
from weft.v1 import engine_service_pb2 as pb
from weft.v1 import generation_pb2

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


async def test_a_failing_sequence_ends_alone_as_internal():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        for slot in range(3):
            await gateway.call.write(submit(slot, [slot, *PROMPT], 30))
        await gateway.read_until(lambda: len(gateway.tokens) == 3)
        (key,) = [key for key in engine.core._live if key[1] == 1]
        engine.runner.fail["sample", key] = RuntimeError("secret")
        await gateway.read_until(lambda: len(gateway.finished) == 3)
        failure = gateway.finished[1].failure
        assert gateway.finished[1].reason == generation_pb2.FINISH_REASON_ERROR
        assert CODES[failure.code] is grpc.StatusCode.INTERNAL
        assert failure.error_id
        assert "secret" not in failure.message
        for slot in (0, 2):
            assert gateway.tokens[slot] == expected([slot, *PROMPT], 30)


async def test_a_bug_in_the_delivery_ends_the_link_and_not_in_silence(monkeypatch):
    def broken(slot, event):
        raise RuntimeError("secret")

    async with running_engine() as engine, linked(engine) as gateway:
        monkeypatch.setattr("services.engine.rpc.convert.finished", broken)
        await gateway.call.write(submit(0, PROMPT, 3))
        error = await ends_with(gateway.call)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()


async def test_a_bug_in_the_conversion_rejects_one_submit(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("secret")

    async with running_engine() as engine, linked(engine) as gateway:
        with monkeypatch.context() as patch:
            patch.setattr("services.engine.rpc.convert.sequence", broken)
            await gateway.call.write(submit(0, PROMPT, 3))
            await gateway.read_until(lambda: gateway.rejected)
        assert CODES[gateway.rejected[0].code] is grpc.StatusCode.INTERNAL
        assert gateway.rejected[0].error_id
        await gateway.call.write(submit(0, PROMPT, 3))
        await gateway.read_until(lambda: gateway.finished)


@pytest.mark.parametrize("how", ["cancel", "half-close", "channel"])
async def test_when_the_link_ends_all_that_came_over_it_ends(how):
    async with running_engine() as engine:
        channel = grpc.aio.insecure_channel(str(engine.server.address))
        stub, engine.stub = engine.stub, type(engine.stub)(channel)
        async with linked(engine) as gateway, asyncio.timeout(10):
            engine.runner.step_s = 0.01
            for slot in range(8):
                await gateway.call.write(submit(slot, [slot, *PROMPT], 1_900))
            await gateway.read_until(lambda: len(gateway.tokens) == 8)
            if how == "cancel":
                gateway.call.cancel()
            elif how == "channel":
                await channel.close()
            else:
                await gateway.call.done_writing()
                while await gateway.read() is not None:
                    pass
                assert await gateway.call.code() is grpc.StatusCode.OK
            await eventually(lambda: engine.core.num_live == 0, within_s=2)
        await channel.close()
        engine.stub = stub


async def test_two_hundred_links_and_calls_that_break_leave_nothing_behind():
    async with running_engine(num_blocks=256) as engine:
        engine.runner.step_s = 0.0005

        async def one(number: int) -> None:
            if number % 2:
                async with linked(engine) as gateway:
                    await gateway.call.write(submit(number, [number % 90, *PROMPT], 200))
                    await asyncio.sleep(number % 7 / 100)
            else:
                request = pb.GenerateTokensRequest(prompt_token_ids=PROMPT, sampling=sampling(200))
                call = engine.stub.GenerateTokens(request)
                await asyncio.sleep(number % 11 / 100)
                call.cancel()

        for start in range(0, 200, 25):
            await asyncio.gather(*(one(number) for number in range(start, start + 25)))


async def test_a_drain_is_announced_lets_run_what_runs_and_refuses_the_rest():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.005
        await gateway.call.write(submit(0, PROMPT, 60))
        await gateway.read_until(lambda: gateway.tokens)
        drain = engine.stub.Drain(pb.DrainRequest(deadline_ms=10_000))
        await gateway.read_until(lambda: gateway.draining)
        assert gateway.draining[0].deadline_ms == 10_000
        await gateway.call.write(submit(1, PROMPT))
        await gateway.read_until(lambda: gateway.finished and gateway.rejected)
        assert gateway.tokens[0] == expected(PROMPT, 60)
        assert CODES[gateway.rejected[1].code] is grpc.StatusCode.UNAVAILABLE
        assert gateway.rejected[1].retry_after_ms > 0
        progress = [response.live async for response in drain]
        assert progress[-1] == 0
        assert progress[0] == 1
        async with linked(engine) as late:
            await late.read_until(lambda: late.draining)
        assert (await engine.stub.GetLoad(pb.GetLoadRequest())).is_draining


@pytest.mark.parametrize("deadline_ms", [2**53 + 1, 2**64 - 1])
async def test_a_drain_with_all_the_time_of_the_world(deadline_ms):
    async with running_engine() as engine, linked(engine) as gateway:
        progress = [r.live async for r in engine.stub.Drain(pb.DrainRequest(deadline_ms=deadline_ms))]
        assert progress == [0]
        async with linked(engine) as late:
            for link in (gateway, late):
                await link.read_until(lambda link=link: link.draining)
                assert link.draining[0].deadline_ms > 2**52


async def test_a_drain_past_its_deadline_cancels():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        await gateway.call.write(submit(0, PROMPT, 1_900))
        await gateway.read_until(lambda: gateway.tokens)
        progress = [response.live async for response in engine.stub.Drain(pb.DrainRequest(deadline_ms=0))]
        assert progress[-1] == 0
        await gateway.read_until(lambda: gateway.finished)
        assert gateway.finished[0].reason == generation_pb2.FINISH_REASON_CANCELLED


async def test_a_device_fault_ends_every_stream_as_unavailable():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        await gateway.call.write(submit(0, PROMPT, 1_900))
        request = pb.GenerateTokensRequest(prompt_token_ids=PROMPT, sampling=sampling(1_900))
        call = engine.stub.GenerateTokens(request)
        await gateway.read_until(lambda: gateway.tokens)
        await call.read()
        key = next(iter(engine.core._live))
        engine.runner.fail["forward", key] = RuntimeError("CUDA error: an illegal memory access")
        for stream in (gateway.call, call):
            error = await ends_with(stream)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "CUDA" not in error.details()
        assert len(engine.faults) == 1
        for late in (engine.stub.Connect(), engine.stub.GenerateTokens(request)):
            assert (await ends_with(late)).code() is grpc.StatusCode.UNAVAILABLE
