"""Requests whose client is gone: how long they live, how many, and what ends them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from services.gateway.config import GatewayConfig
from services.gateway.streams.orphans import Retention, RetentionLimits
from tests.services.gateway.streams.test_resume import Follower, ask, core, quiet, read, refused, whole
from weft.config import ConfigError
from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

CODE = grpc.StatusCode


@dataclass(eq=False)
class Thing:
    num_bytes: int = 10
    ended: list[Thing] = field(default_factory=list)

    def expire(self) -> None:
        self.ended.append(self)


async def test_retention_ends_the_oldest_over_its_bounds() -> None:
    ended: list[Thing] = []
    retention = Retention(RetentionLimits(ttl_s=60, max_items=3, max_bytes=100))
    things = [Thing(10, ended) for _ in range(4)]
    for thing in things:
        retention.keep(thing)
    assert ended == [things[0]]
    retention.keep(things[1])  # anew: it is the youngest now
    things[3].num_bytes = 95
    retention.hold_to_bounds()
    assert ended == [things[0], things[2], things[3]]
    assert list(retention) == [things[1]]
    assert retention.num_crowded_out == 3
    assert retention.num_bytes == 10
    assert retention.release(things[1])
    assert not retention.release(things[1])
    retention.keep(Thing(101, ended))
    assert len(retention) == 0


async def test_retention_ends_things_in_time(settle: Any) -> None:
    ended: list[Thing] = []
    retention = Retention(RetentionLimits(ttl_s=0.05))
    first, second = Thing(1, ended), Thing(1, ended)
    retention.keep(first)
    retention.keep(second)
    retention.release(second)
    await settle(lambda: ended == [first])
    await asyncio.sleep(0.05)
    assert ended == [first]
    assert retention.num_expired == 1


async def leave(gateway: Any, settle: Any, request: pb.GenerateRequest, num_events: int = 4) -> Follower:
    """Begin a request, read a little, break the connection; return once nobody is at it."""
    follower = Follower(max(1, request.sampling.n))
    await read(gateway.stub.Generate(request), follower, num_events)
    await settle(lambda: not core(gateway).attendance.readers)
    return follower


async def gone(gateway: Any, follower: Follower, request: pb.GenerateRequest) -> None:
    """Nothing is kept of a request."""
    error = await refused(gateway.stub.Generate(follower.resume(request)))
    assert error.code() == CODE.NOT_FOUND
    assert error_from_call(error).reason == "REQUEST_NOT_FOUND"


async def test_an_orphan_ends_in_its_time(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine(step_s=0.02)
    gateway = await start_gateway(engine, orphan_ttl=0.3)
    request = ask(max_tokens=1000)
    follower = await leave(gateway, settle, request)
    assert len(engine.slots) == 1
    await settle(lambda: not engine.slots)
    await quiet(gateway, settle)
    assert core(gateway).counters.by_code["CANCELLED"] == 1
    assert not len(core(gateway).attendance.retention)
    assert core(gateway).admission.num_live == 0
    await gone(gateway, follower, request)


async def test_an_outcome_is_kept_for_a_time(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, orphan_ttl=0.5)
    request = ask(max_tokens=10)
    follower = Follower()
    await read(gateway.stub.Generate(request), follower)
    assert len(core(gateway).attendance.remnants) == 1
    await settle(lambda: not len(core(gateway).attendance.remnants))
    await gone(gateway, follower, request)
    # The id is free again.
    await read(gateway.stub.Generate(ask("Another text", max_tokens=5)), Follower())


async def test_over_the_bound_the_oldest_ends(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine(step_s=0.02)
    gateway = await start_gateway(engine, max_retained_requests=2)
    requests = [ask(request_id=f"r{i}", max_tokens=900) for i in range(3)]
    followers = [await leave(gateway, settle, request) for request in requests]
    await settle(lambda: len(engine.slots) == 2)
    await gone(gateway, followers[0], requests[0])
    call = gateway.stub.Generate(followers[2].resume(requests[2]))
    await read(call, followers[2], 3)
    for i in (1, 2):
        await gateway.stub.Cancel(pb.CancelRequest(request_id=f"r{i}"))
    await quiet(gateway, settle)


async def test_bytes_are_bounded_while_orphans_grow(
    start_engine: Any, start_gateway: Any, settle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.gateway.SWEEP_S", 0.05)
    engine = await start_engine(steps_per_frame=4)
    gateway = await start_gateway(engine, max_retained_bytes=5000)
    request = ask(max_tokens=1000)
    follower = await leave(gateway, settle, request)
    await settle(lambda: not engine.slots)
    await quiet(gateway, settle)
    assert core(gateway).attendance.retention.num_crowded_out == 1
    await gone(gateway, follower, request)


async def test_cancel_of_attached_orphaned_and_ended(gateway: Any, engine: Any, settle: Any) -> None:
    engine.step_s = 0.02
    attached, orphaned = ask(request_id="a", max_tokens=900), ask(request_id="o", max_tokens=900)
    call, follower = gateway.stub.Generate(attached), Follower()
    follower.take(await call.read())
    await gateway.stub.Cancel(pb.CancelRequest(request_id="a"))
    await read(call, follower)
    assert follower.finishes[0].reason == gen.FINISH_REASON_CANCELLED
    left = await leave(gateway, settle, orphaned)
    await gateway.stub.Cancel(pb.CancelRequest(request_id="o"))
    await settle(lambda: not engine.slots)
    await quiet(gateway, settle)
    for request_id in ("a", "o", "never"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.Cancel(pb.CancelRequest(request_id=request_id))
        assert caught.value.code() == CODE.NOT_FOUND
    # The outcome of what was cancelled is kept like any other.
    await read(gateway.stub.Generate(left.resume(orphaned)), left)
    assert left.finishes[0].reason == gen.FINISH_REASON_CANCELLED
    assert left.finishes[0].usage.completion_tokens == len(left.ids[0])


async def test_the_deadline_is_the_first_calls(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine(step_s=0.02)
    gateway = await start_gateway(engine)
    request = ask(max_tokens=900)
    follower = Follower()
    await read(gateway.stub.Generate(request, timeout=1.0), follower, 4)
    await settle(lambda: not engine.slots)
    await read(gateway.stub.Generate(follower.resume(request), timeout=60), follower)
    assert follower.finishes[0].reason == gen.FINISH_REASON_DEADLINE
    assert 0 < len(follower.ids[0]) < 900


async def test_a_drain_ends_orphans_and_waits_for_readers(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(step_s=0.01)
    gateway = await start_gateway(engine, drain_seconds=20.0)
    await leave(gateway, settle, ask(request_id="o", max_tokens=1000))
    call, follower = gateway.stub.Generate(ask(max_tokens=60)), Follower()
    follower.take(await call.read())
    drain = asyncio.create_task(gateway.application.drain())
    await settle(lambda: len(engine.slots) == 1)
    error = await refused(gateway.stub.Generate(ask(request_id="o", max_tokens=1000)))
    assert error_from_call(error).reason == "DRAINING"
    await read(call, follower)
    assert len(follower.ids[0]) == 60
    await drain
    await quiet(gateway, settle)


async def test_who_leaves_during_a_drain_ends_the_request(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(step_s=0.02)
    gateway = await start_gateway(engine, drain_seconds=60.0)
    call = gateway.stub.Generate(ask(max_tokens=1000))
    await call.read()
    drain = asyncio.create_task(gateway.application.drain())
    await asyncio.sleep(0.05)
    call.cancel()
    await settle(lambda: not engine.slots)
    await settle(drain.done)


async def test_what_a_drain_cuts_short_says_how_to_go_on(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(step_s=0.01)
    gateway = await start_gateway(engine, drain_seconds=0.2)
    request = ask(max_tokens=900)
    request.resumable = False
    call, follower = gateway.stub.Generate(request), Follower()
    for _ in range(3):
        follower.take(await call.read())
    drain = asyncio.create_task(gateway.application.drain())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call, follower)
    error = error_from_call(caught.value)
    assert (error.code, error.reason) == (CODE.UNAVAILABLE, "DRAINING")
    assert error.metadata["resume_token"]
    await drain
    assert not engine.slots or (await settle(lambda: not engine.slots)) is None


async def test_a_storm_leaves_nothing_behind(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine(step_s=0.005)
    gateway = await start_gateway(engine, orphan_ttl=0.5)

    async def one(number: int) -> None:
        request = ask(request_id=f"s{number}", max_tokens=50, n=1 + number % 3)
        follower = Follower(request.sampling.n)
        for _ in range(3):
            await read(gateway.stub.Generate(follower.resume(request)), follower, number % 7)
        if number % 2:
            await read(gateway.stub.Generate(follower.resume(request)), follower)
            assert all(len(ids) == 50 for ids in follower.ids)

    before = len(asyncio.all_tasks())
    await asyncio.gather(*(one(number) for number in range(40)))
    await settle(lambda: not len(core(gateway).attendance.retention), 10)
    await quiet(gateway, settle)
    assert not core(gateway).entries
    assert not core(gateway).attendance.readers
    assert not core(gateway).attendance.keepers
    assert not core(gateway).attendance.remnants._by_key
    assert core(gateway).admission.num_live == core(gateway).admission.num_waiting == 0
    await settle(lambda: not engine.slots and len(asyncio.all_tasks()) <= before)
    assert engine.num_begun == engine.num_ended


@pytest.mark.parametrize("flag", ["orphan_ttl", "max_retained_requests", "max_retained_bytes"])
def test_flags(flag: str, tmp_path: Any) -> None:
    GatewayConfig(tokenizer=tmp_path, **{flag: 0})
    with pytest.raises(ConfigError):
        GatewayConfig(tokenizer=tmp_path, **{flag: -1})


async def test_nothing_is_kept_when_nothing_may_be(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(step_s=0.02)
    gateway = await start_gateway(engine, max_retained_requests=0)
    request = ask(max_tokens=900)
    follower = await leave(gateway, settle, request)
    await settle(lambda: not engine.slots)
    await gone(gateway, follower, request)
    short = ask(max_tokens=5)
    await read(gateway.stub.Generate(short), Follower())
    assert (await whole(gateway, short)).is_done
