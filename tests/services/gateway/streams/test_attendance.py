"""Calls that come to one request at once, or come back to one that is over: who goes on, and who lets go."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import grpc
import httpx
import pytest

from services.gateway import gateway as gateway_module
from services.gateway.routing.places import Places
from services.gateway.streams.reader import Reader
from tests.services.gateway.streams.test_resume import Follower, ask, core, cut, quiet, read, refused, whole
from weft.rpc.address import parse_address
from weft.rpc.auth import ANYBODY
from weft.rpc.errors import StatusError, error_from_call
from weft.v1 import gateway_service_pb2 as pb

CODE = grpc.StatusCode


async def come_up(gateway: Any, engine: Any, settle: Any) -> None:
    """The engine that was killed is there again."""
    await engine.start(engine.address)
    await settle(lambda: gateway.link.is_up)


async def hang(gateway: Any, request: pb.GenerateRequest, is_writing: asyncio.Event) -> None:
    """A call whose first write never ends."""
    async with core(gateway).open(request, caller=ANYBODY, budget_s=None) as reader:
        await reader.admitted()
        for update in await reader.take_updates() or ():
            reader.sending(update)
        is_writing.set()
        await asyncio.Event().wait()


async def test_who_was_superseded_counts_nothing_as_sent(gateway: Any, engine: Any, settle: Any) -> None:
    """Its write may end in the same moment, before it is called off."""
    engine.step_s = 0.02
    opened = core(gateway).open(ask(n=2, max_tokens=900), caller=ANYBODY, budget_s=None)
    async with opened as first:
        await first.admitted()
        while len(updates := await first.take_updates() or []) < 2:
            pass
        first.sending(updates[0])
        (live,) = [entry.live for entry in core(gateway).entries]
        live.attach([(0, 0), (0, 0)])
        with pytest.raises(StatusError, match="another call"):
            first.sending(updates[1])
        first.given_at = None  # it is in no write
    assert [sample.journal.num_sent for sample in live.samples] == [0, 0]
    core(gateway).cancel(None, "r")
    live.leave(live.reader)
    await quiet(gateway, settle)


async def test_a_token_used_again_ends_a_write_that_hangs(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=0.0)
    request = ask(max_tokens=80)
    request.resumable = False
    follower = Follower()
    error = error_from_call(await cut(gateway, engine, request, follower))
    await come_up(gateway, engine, settle)
    again = pb.GenerateRequest(resume_token=error.metadata["resume_token"])
    is_writing = asyncio.Event()
    hanging = asyncio.create_task(hang(gateway, again, is_writing))
    async with asyncio.timeout(10):
        await is_writing.wait()
        await read(gateway.stub.Generate(again), follower)
        with pytest.raises(StatusError, match="another call"):
            await hanging
    assert follower.outcome() == (await whole(gateway, request)).outcome()
    await quiet(gateway, settle)


async def test_who_comes_back_to_what_failed_ends_a_write_that_hangs(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(step_s=0.01)
    gateway = await start_gateway(engine, engine_wait_seconds=0.0)
    request = ask(max_tokens=80)
    is_writing = asyncio.Event()
    hanging = asyncio.create_task(hang(gateway, request, is_writing))
    async with asyncio.timeout(10):
        await is_writing.wait()
        await engine.die()
        await settle(lambda: len(core(gateway).attendance.remnants) == 1)
        await come_up(gateway, engine, settle)
        follower = Follower()
        await read(gateway.stub.Generate(request), follower)
        with pytest.raises(StatusError, match="another call"):
            await hanging
    assert follower.outcome() == (await whole(gateway, request)).outcome()
    await quiet(gateway, settle)


async def test_a_token_does_not_lead_to_a_later_request_of_its_id(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    """Same id, same body, another seed: what was sent of the one is no place in the other."""
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=0.0)
    request = ask(max_tokens=500)
    request.sampling.ClearField("seed")
    request.resumable = False
    error = error_from_call(await cut(gateway, engine, request, Follower()))
    await come_up(gateway, engine, settle)
    engine.step_s = 0.02
    request.resumable = True
    later = gateway.stub.Generate(request)
    await later.read()
    again = pb.GenerateRequest(resume_token=error.metadata["resume_token"])
    assert (await refused(gateway.stub.Generate(again))).code() == CODE.ALREADY_EXISTS
    await gateway.stub.Cancel(pb.CancelRequest(request_id="r"))
    later.cancel()
    await quiet(gateway, settle)


async def test_an_outcome_is_read_whatever_the_queue_and_the_deadline(gateway: Any, settle: Any) -> None:
    request = ask(max_tokens=10)
    first = Follower()
    await read(gateway.stub.Generate(request, timeout=1.0), first)
    await quiet(gateway, settle)
    await asyncio.sleep(1.0)
    core(gateway).dispatcher._find_places = lambda info: Places(0, 0, 0)
    again = Follower()
    num_waiting: list[int] = []
    call = gateway.stub.Generate(request, timeout=10)
    again.take(await call.read())
    num_waiting.append(core(gateway).admission.num_waiting)
    await read(call, again)
    assert again.outcome() == first.outcome()
    assert core(gateway).dispatcher.num_queued_ever == 0
    assert num_waiting == [0], "what has its tokens waits for none"


async def test_a_prompt_that_waits_for_its_turn_is_not_a_slow_client(
    start_engine: Any, start_gateway: Any, settle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several prompts of one HTTP request: nothing is written before the last one has its place."""
    monkeypatch.setattr(gateway_module, "SWEEP_S", 0.05)
    engine = await start_engine()
    gateway = await start_gateway(engine, slow_client_seconds=0.3, http=parse_address("127.0.0.1:0"))
    dispatcher = core(gateway).dispatcher
    find_places, has_room = dispatcher._find_places, asyncio.Event()
    monkeypatch.setattr(dispatcher, "_begin", lambda turn, now: (begun.append(turn), begin(turn, now)))
    begin, begun = type(dispatcher)._begin.__get__(dispatcher), []
    dispatcher._find_places = lambda info: (
        find_places(info) if not begun or has_room.is_set() else Places(0, 0, 0)
    )
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=gateway.http_url, timeout=20))
        body = {"model": "demo", "prompt": ["Once", "Twice"], "max_tokens": 5, "seed": 1}
        posted = asyncio.create_task(http.post("/v1/completions", json=body))
        await settle(lambda: dispatcher.num_waiting == 1 and len(begun) == 1)
        await asyncio.sleep(0.8)
        has_room.set()
        answer = await posted
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 2


async def test_who_is_superseded_in_its_first_write_is_told(
    gateway: Any, settle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library counts initial metadata as sent only when the write that brings it has returned; sent once
    more, with the status, they are refused, and the client would wait for ever.
    """
    writing = Reader.writing

    def begin(reader: Reader) -> None:
        writing(reader)
        reader.supersede()

    monkeypatch.setattr(Reader, "writing", begin)
    async with asyncio.timeout(10):
        for _ in range(20):
            error = await refused(gateway.stub.Generate(ask(max_tokens=5)))
            assert error.code() == CODE.ABORTED
            assert error_from_call(error).reason == "SUPERSEDED"
            await quiet(gateway, settle)
