"""Many requests on one client stream; each ends on its own."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
from collections import defaultdict
from typing import Any

import grpc
import pytest

from services.gateway import client_streams
from services.gateway.client_streams import ClientStreams
from weft.rpc.auth import ANYBODY
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen


def generate(
    stream_id: int, budget_ms: int | None = None, text: str = "Once", **sampling: Any
) -> pb.MultiplexRequest:
    request = pb.GenerateRequest(text=text, sampling=gen.SamplingParams(**sampling))
    return pb.MultiplexRequest(stream_id=stream_id, generate=request, budget_ms=budget_ms)


class Client:
    """One Multiplex call: what came, by stream."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.Multiplex()
        self.ids: dict[int, list[int]] = defaultdict(list)
        self.finishes: dict[int, list[Any]] = defaultdict(list)
        self.ends: dict[int, Any] = {}

    async def send(self, *requests: pb.MultiplexRequest) -> None:
        for request in requests:
            await self.call.write(request)

    async def receive(self, num_ends: int) -> None:
        while len(self.ends) < num_ends:
            response = await self.call.read()
            assert response is not grpc.aio.EOF
            stream_id = response.stream_id
            assert stream_id not in self.ends, "something came after the end"
            if response.HasField("end"):
                self.ends[stream_id] = response.end
            elif response.response.HasField("delta"):
                self.ids[stream_id] += response.response.delta.token_ids
            elif response.response.HasField("finish"):
                self.finishes[stream_id].append(response.response.finish)

    async def close(self) -> None:
        await self.call.done_writing()
        assert await self.call.read() is grpc.aio.EOF


async def test_many_streams_each_get_their_own(gateway: Any, engine: Any) -> None:
    oracle = sys.modules[type(engine).__module__].oracle
    client = Client(gateway.stub)
    await client.send(*(generate(i, seed=i, max_tokens=30) for i in range(40)))
    await client.receive(40)
    for i in range(40):
        assert client.ids[i] == [oracle(i, 0, position) for position in range(30)]
        assert not client.ends[i].HasField("failure")
    await client.close()


async def test_failures_end_one_stream_each(gateway: Any, engine: Any) -> None:
    engine.step_s = 0.005
    engine.error_at["bad"] = 3
    bad = generate(5, seed=1, max_tokens=50)
    bad.generate.request_id = "bad"
    client = Client(gateway.stub)
    await client.send(
        generate(1, seed=1, max_tokens=50),
        generate(2, seed=1, max_tokens=0),
        generate(3, seed=1, max_tokens=50, text=""),
        generate(4, budget_ms=150, seed=1),
        bad,
        generate(6, seed=1, top_p=2.0),
        pb.MultiplexRequest(stream_id=7),
        generate(8, seed=1),
    )
    await asyncio.sleep(0.1)
    await client.send(
        pb.MultiplexRequest(stream_id=8, cancel=pb.CancelStream()),
        pb.MultiplexRequest(stream_id=99, cancel=pb.CancelStream()),
    )
    await client.receive(8)
    codes = {i: end.failure.code for i, end in client.ends.items()}
    assert codes == {1: 0, 2: 3, 3: 3, 4: 0, 5: 13, 6: 3, 7: 3, 8: 0}
    assert len(client.ids[1]) == 50
    assert client.finishes[4][0].reason == gen.FINISH_REASON_DEADLINE
    assert client.finishes[8][0].reason == gen.FINISH_REASON_CANCELLED
    assert client.ends[2].failure.field_violations[0].field == "sampling.max_tokens"
    await client.send(generate(2, seed=1, max_tokens=3))
    client.ends.pop(2)
    await client.receive(8)
    assert not client.ends[2].HasField("failure")
    await client.close()


async def test_leaving_cancels_everything(gateway: Any, engine: Any, settle: Any) -> None:
    client = Client(gateway.stub)
    await client.send(*(generate(i, seed=i) for i in range(8)))
    await settle(lambda: len(engine.slots) == 8)
    client.call.cancel()
    await settle(lambda: not engine.slots)


async def test_clients_that_leave_at_any_point_are_no_failures(
    gateway: Any, engine: Any, settle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.steps_per_frame = 4
    chance = random.Random(3)
    options = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 4096),
        ("grpc.use_local_subchannel_pool", 1),
    ]

    async def leave_early() -> None:
        async with grpc.aio.insecure_channel(str(gateway.server.address), options=options) as channel:
            call = type(gateway.stub)(channel).Multiplex()
            for i in range(4):
                await call.write(generate(i, seed=4, n=2, logprobs=20, max_tokens=900))
            for _ in range(chance.randrange(4)):
                await call.read()
            await asyncio.sleep(chance.random())
            if chance.random() < 0.5:
                call.cancel()

    for _ in range(3):
        await asyncio.gather(*(leave_early() for _ in range(8)))
    await settle(lambda: not engine.slots, 20)
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert set(gateway.application.gateway.counters.by_code) <= {"OK", "CANCELLED"}


async def test_a_live_stream_id_cannot_be_taken(gateway: Any) -> None:
    client = Client(gateway.stub)
    await client.send(generate(1, seed=1), generate(1, seed=2))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.receive(1)
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS


async def test_a_cancel_is_checked_like_any_other_command(gateway: Any) -> None:
    unknown = pb.MultiplexRequest(stream_id=1, cancel=pb.CancelStream())
    unknown.cancel.MergeFromString(bytes([0x98, 0x06, 0x01]))
    late = pb.MultiplexRequest(stream_id=2, cancel=pb.CancelStream(), budget_ms=5)
    client = Client(gateway.stub)
    await client.send(unknown, late)
    await client.receive(2)
    assert {i: end.failure.code for i, end in client.ends.items()} == {1: 3, 2: 3}
    assert client.ends[1].failure.field_violations[0].field == "cancel.99"
    assert client.ends[2].failure.field_violations[0].field == "budget_ms"
    await client.close()


class SlowReader:
    """Takes nothing before `go`; remembers what it took."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.taken: list[pb.MultiplexResponse] = []

    async def write(self, response: pb.MultiplexResponse) -> None:
        await self.go.wait()
        self.taken.append(response)


async def test_every_end_is_written_however_slow_the_reader(gateway: Any) -> None:
    reader = SlowReader()
    streams = ClientStreams(gateway.application.gateway, reader.write, caller=ANYBODY, budget_s=None)

    async def requests() -> Any:
        for i in range(5):
            yield generate(i, text="", seed=1)
        await asyncio.sleep(0.1)  # all have failed, none has said so

    run = asyncio.create_task(streams.run(requests()))
    await asyncio.sleep(0.3)
    assert not run.done()
    reader.go.set()
    await run
    assert sorted(response.stream_id for response in reader.taken) == list(range(5))


async def test_ends_that_nobody_reads_are_bounded(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_streams, "MAX_STREAMS", 10)
    reader = SlowReader()
    streams = ClientStreams(gateway.application.gateway, reader.write, caller=ANYBODY, budget_s=None)
    num_read = 0

    async def requests() -> Any:
        nonlocal num_read
        for i in range(100):
            yield generate(i, text="", seed=1)
            num_read += 1
            await asyncio.sleep(0.002)

    tasks = len(asyncio.all_tasks())
    run = asyncio.create_task(streams.run(requests()))
    await asyncio.sleep(0.5)
    assert num_read <= 10
    assert len(asyncio.all_tasks()) - tasks <= 12
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert len(asyncio.all_tasks()) <= tasks


async def test_what_was_asked_before_the_half_close_is_served(gateway: Any) -> None:
    client = Client(gateway.stub)
    await client.send(generate(1, seed=1, max_tokens=20))
    await client.call.done_writing()
    await client.receive(1)
    assert len(client.ids[1]) == 20
