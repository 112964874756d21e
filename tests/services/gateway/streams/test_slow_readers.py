"""Clients that do not read: they cost nobody else anything, are given up in time, and may come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from services.gateway import gateway as gateway_module
from tests.services.gateway.streams.test_resume import Follower, ask, core, read, whole
from tools.mock_engine import MockEngine
from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

CODE = grpc.StatusCode


@pytest.fixture(autouse=True)
def _sweeps_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "SWEEP_S", 0.05)


@asynccontextmanager
async def small_window(gateway: Any) -> AsyncIterator[Any]:
    """A stub whose connection takes little ahead of its reader."""
    options = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 4096),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(str(gateway.server.address), options=options) as channel:
        yield type(gateway.stub)(channel)


def large(num_tokens: int, request_id: str = "") -> pb.GenerateRequest:
    """A request whose output is far more than a connection takes unread."""
    request = ask(n=8, max_tokens=num_tokens, logprobs=20, request_id=request_id)
    request.resumable = False
    return request


async def given_up(call: Any, follower: Follower) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call, follower)
    return caught.value


# 200 tokens of a sample never pause a slot: then nothing but the write itself shows that nobody reads.
@pytest.mark.parametrize(("num_tokens", "is_resumable"), [(200, False), (900, False), (900, True)])
async def test_given_up_then_read_then_resumed(
    start_engine: Any, start_gateway: Any, settle: Any, num_tokens: int, is_resumable: bool
) -> None:
    engine = await start_engine(steps_per_frame=8)
    gateway = await start_gateway(engine, slow_client_seconds=0.4)
    request = large(num_tokens, "slow")
    request.resumable = is_resumable
    async with small_window(gateway) as stub:
        call = stub.Generate(request)
        follower = Follower(8)
        follower.take(await call.read())
        await settle(lambda: core(gateway).counters.by_code["ABORTED"] == 1, 20)
        core(gateway)._slow_client_s = 60.0  # from here on the client is as fast as this machine lets it
        # Over at this moment, although the client has read nothing yet.
        assert core(gateway).num_live == 0
        assert core(gateway).admission.num_live == 0
        await settle(lambda: not engine.slots)
        assert len(core(gateway).attendance.remnants) == 1
        error = await given_up(call, follower)
        assert error.code() == CODE.ABORTED
        details = error_from_call(error)
        assert details.reason == "SLOW_CONSUMER"
        assert 0 < sum(map(len, follower.ids)) < 8 * num_tokens
        num_before = [len(ids) for ids in follower.ids]
        token = pb.GenerateRequest(resume_token=details.metadata["resume_token"])
        await read(stub.Generate(follower.resume(request) if is_resumable else token), follower)
    assert all(len(ids) >= before for ids, before in zip(follower.ids, num_before, strict=True))
    assert follower.outcome() == (await whole(gateway, request)).outcome()
    assert follower.logprobs == follower.ids


async def test_many_requests_of_one_slow_connection(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    """Each is given up on its own, and each end has its own token."""
    engine = await start_engine(steps_per_frame=8)
    gateway = await start_gateway(engine, slow_client_seconds=0.4)
    followers = {number: Follower(8) for number in (1, 2, 3)}
    async with small_window(gateway) as stub:
        call = stub.Multiplex()
        for number in followers:
            await call.write(pb.MultiplexRequest(stream_id=number, generate=large(600)))
        await settle(lambda: core(gateway).counters.by_code["ABORTED"] == 3, 20)
        core(gateway)._slow_client_s = 60.0
        assert core(gateway).num_live == 0
        await settle(lambda: not engine.slots)
        tokens: dict[int, str] = {}
        while len(tokens) < 3:
            response = await call.read()
            if response.HasField("end"):
                assert response.end.failure.reason == "SLOW_CONSUMER"
                tokens[response.stream_id] = response.end.failure.resume_token
            else:
                followers[response.stream_id].take(response.response)
        assert len(set(tokens.values())) == 3
        for number, token in tokens.items():
            again = pb.GenerateRequest(resume_token=token)
            await call.write(pb.MultiplexRequest(stream_id=number + 10, generate=again))
        num_ends = 0
        while num_ends < 3:
            response = await call.read()
            if response.HasField("end"):
                assert not response.end.HasField("failure"), response.end
                num_ends += 1
            else:
                followers[response.stream_id - 10].take(response.response)
        call.cancel()
    expected = await whole(gateway, large(600))
    for follower in followers.values():
        assert follower.outcome() == expected.outcome()


async def test_a_slow_reader_that_reads_is_not_given_up(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(steps_per_frame=8)
    gateway = await start_gateway(engine, slow_client_seconds=3.0)
    request = large(300)
    async with small_window(gateway) as stub:
        call = stub.Generate(request)
        follower = Follower(8)
        until = time.monotonic() + 5.0
        while not follower.is_done:
            follower.take(await call.read())
            if time.monotonic() < until:
                await asyncio.sleep(0.05)
        call.cancel()
    assert follower.outcome() == (await whole(gateway, request)).outcome()


async def test_what_waits_for_a_slow_reader_is_small(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(steps_per_frame=4)
    engine.info.max_model_len = 40_000
    gateway = await start_gateway(engine)
    request = pb.GenerateRequest(text="x", sampling=gen.SamplingParams(seed=1, max_tokens=30_000))
    async with small_window(gateway) as stub:
        call = stub.Generate(request)
        await call.read()
        await settle(lambda: engine.pauses > 0, 60)
        (live,) = core(gateway).attendance.readers.values()
        assert live.samples[0].output.num_pending < 512
        assert live.num_bytes < 64 << 10
        call.cancel()


async def test_a_paused_slot_gives_its_blocks_to_others(start_gateway: Any, settle: Any) -> None:
    """Over the real scheduler: the cache holds one long output, and a reader of one stops in the middle."""
    async with MockEngine(step_ms=1, num_blocks=24, block_size=16, max_model_len=384) as engine:
        gateway = await start_gateway(engine, slow_client_seconds=30.0)
        slow_request = pb.GenerateRequest(
            text="x", sampling=gen.SamplingParams(seed=1, max_tokens=370, logprobs=20)
        )
        async with small_window(gateway) as stub:
            call = stub.Generate(slow_request)
            follower = Follower()
            follower.take(await call.read())
            sample = next(iter(core(gateway).attendance.readers.values())).samples[0]
            await settle(lambda: sample.paused_at is not None, 20)
            for seed in range(3):
                others = await asyncio.gather(
                    *(whole(gateway, ask(seed=10 * seed + i, max_tokens=250)) for i in range(2))
                )
                assert all(len(other.ids[0]) == 250 for other in others)
            await read(call, follower)
        assert follower.outcome() == (await whole(gateway, slow_request)).outcome()
        assert follower.finishes[0].receipt.preemptions >= 1
