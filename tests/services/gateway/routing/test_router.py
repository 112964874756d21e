"""Samples between engines: drains, moves, refusals, poison, versions, breakers, and who is told of room."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from services.gateway.links.breaker import BreakerState
from services.gateway.routing.places import MIN_AHEAD, find_places
from tools.mock_engine import MockEngine
from tools.mock_engine.oracle import expected_tokens
from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen


def wanted(seed: int = 1, tokens: int = 100, **fields: Any) -> pb.GenerateRequest:
    sampling = gen.SamplingParams(seed=seed, max_tokens=tokens)
    return pb.GenerateRequest(text="Once upon a time", sampling=sampling, **fields)


async def ids_of(call: Any) -> list[int]:
    return [id_ async for response in call for id_ in response.delta.token_ids]


def expected(engine: Any, seed: int, tokens: int) -> list[int]:
    oracle = sys.modules[type(engine).__module__].oracle
    return [oracle(seed, 0, position) for position in range(tokens)]


@pytest.fixture
def settle() -> Any:
    """Wait until something holds; for long, since other work may have the machine."""

    async def wait(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110 - any condition can be waited for
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def start_pair(start_engine: Any, start_gateway: Any, settle: Any) -> Any:
    """Two engines, the first with these knobs, and a gateway with both links up."""

    async def start(*, first: Any = None, second: Any = None, **options: Any) -> Any:
        engines = [await start_engine(**(first or {})), await start_engine(**(second or {}))]
        gateway = await start_gateway(*engines, **options)
        await settle(lambda: all(link.is_up for link in gateway.application.router.links))
        return gateway, engines, list(gateway.application.router.links)

    return start


def streams(gateway: Any, count: int, tokens: int = 400) -> list[asyncio.Task[list[int]]]:
    return [asyncio.create_task(ids_of(gateway.stub.Generate(wanted(seed, tokens)))) for seed in range(count)]


async def check(tasks: list[asyncio.Task[list[int]]], engine: Any, tokens: int = 400) -> None:
    for seed, ids in enumerate(await asyncio.gather(*tasks)):
        assert ids == expected(engine, seed, tokens)


async def test_a_drain_moves_samples_at_once(start_pair: Any, settle: Any) -> None:
    gateway, (first, second), (link, other) = await start_pair(
        first={"step_s": 0.02}, second={"step_s": 0.02}
    )
    tasks = streams(gateway, 8, 150)
    await settle(lambda: len(first.slots) + len(second.slots) == 8)
    num_first = len(first.slots)
    assert num_first
    await settle(lambda: link.counters.tokens > 8)
    first.announces_drain = True
    await settle(lambda: len(second.slots) == 8)
    await settle(lambda: not first.slots)
    assert link.counters.moved_samples == gateway.application.router.counters["moves"] == num_first
    assert all(submit.emitted_token_ids for submit in second.submits[-num_first:])
    await check(tasks, first, 150)
    assert link.counters.dropped_position == other.counters.dropped_position == 0
    assert link.counters.dropped_slot == 0
    assert gateway.application.router.counters["inexact"] == 0


async def test_a_drain_without_another_engine_moves_nothing(gateway: Any, engine: Any, settle: Any) -> None:
    tasks = streams(gateway, 4)
    await settle(lambda: gateway.link.counters.tokens > 20)
    engine.announces_drain = True
    await check(tasks, engine)
    assert gateway.link.counters.moved_samples == 0
    assert len(engine.submits) == 4


async def test_a_drain_moves_no_more_than_there_is_room_for(start_pair: Any, settle: Any) -> None:
    gateway, (first, second), (link, other) = await start_pair(
        first={"step_s": 0.01}, second={"step_s": 0.01}
    )
    other.load.max_batch_size, other.load.max_queue_size = 2, 8
    tasks = streams(gateway, 5, 150)
    await settle(lambda: len(first.slots) + len(second.slots) == 5)
    first.announces_drain = True
    await settle(lambda: link.is_draining)
    seen = 0
    while len(first.slots) and not all(task.done() for task in tasks):
        seen = max(seen, len(second.slots))
        await asyncio.sleep(0.01)
    await check(tasks, first, 150)
    assert seen == 2
    assert not second.violations


async def test_samples_go_only_to_the_same_artifact(start_pair: Any, settle: Any, start_engine: Any) -> None:
    gateway, (first, second), (link, _) = await start_pair(engine_wait_seconds=0.5)
    second.info.artifact_digest = "sha256:other"
    await second.die()
    await second.start(second.address)
    await settle(
        lambda: (
            {one.info.artifact_digest for one in gateway.application.router.links}
            == {"sha256:0", "sha256:other"}
            and all(one.is_up for one in gateway.application.router.links)
        )
    )
    tasks = streams(gateway, 6, 900)
    await settle(lambda: link.counters.tokens > 20)
    seen = len(second.submits)
    await first.die()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    lost = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert lost
    assert all(error_from_call(end).reason == "ENGINE_LOST" for end in lost)
    assert len(second.submits) == seen


async def test_other_numerics_are_only_the_second_choice(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engines = [await start_engine(step_s=0.005) for _ in range(3)]
    engines[2].info.numerics_id = "another"
    gateway = await start_gateway(*engines)
    router = gateway.application.router
    await settle(lambda: all(link.is_up for link in router.links))
    router.links[2].load.max_batch_size = 1  # what begins goes to the first two
    tasks = streams(gateway, 4, 800)
    await settle(lambda: sum(len(engine.slots) for engine in engines) == 4)
    num_moved = len(engines[0].slots) + len(engines[1].slots)
    assert num_moved >= 3
    await settle(lambda: min(len(slot.ids) for engine in engines for slot in engine.slots.values()) > 20)
    router.links[2].load.max_batch_size = 1000
    await engines[0].die()
    await settle(lambda: len(engines[1].slots) == num_moved)
    assert router.counters["inexact"] == 0
    await engines[1].die()
    await settle(lambda: len(engines[2].slots) == 4)
    assert router.counters["inexact"] == num_moved
    await check(tasks, engines[0], 800)


async def test_a_stream_that_gets_on_may_be_moved_many_times(start_pair: Any, settle: Any) -> None:
    gateway, engines, links = await start_pair()
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(1, 1000))))
    for _ in range(10):
        await settle(lambda: any(len(engine.slots) == 1 for engine in engines))
        engine = next(engine for engine in engines if engine.slots)
        (slot,) = engine.slots.values()
        before = len(slot.ids)
        await settle(lambda slot=slot, before=before: len(slot.ids) > before + 20)
        await engine.die()
        await engine.start(engine.address)
        await settle(lambda: all(link.is_up for link in links))
    assert await task == expected(engines[0], 1, 1000)
    assert gateway.application.router.num_replays == 10


async def test_a_request_that_kills_engines_kills_four(start_pair: Any, settle: Any) -> None:
    gateway, engines, _ = await start_pair(first={"step_s": 0.05}, second={"step_s": 0.05})
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(1, 900))))
    for number in range(1, 5):
        await settle(lambda number=number: sum(len(engine.submits) for engine in engines) == number)
        engine = max(engines, key=lambda engine: len(engine.slots))
        await engine.die()
        await engine.start(engine.address)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await task
    assert error_from_call(caught.value).reason == "ENGINE_LOST"
    assert sum(len(engine.submits) for engine in engines) == 4
    assert gateway.application.router.counters["poisonous"] == 1


async def test_without_budget_samples_wait_for_it(start_pair: Any, settle: Any) -> None:
    gateway, (first, second), _ = await start_pair()
    tasks = streams(gateway, 6, 600)
    await settle(lambda: len(first.slots) + len(second.slots) == 6 and len(first.slots) > 1)
    num_first = len(first.slots)
    budget = gateway.application.router.budget
    budget._tokens, budget._floor_per_s = 1.0, 4.0
    await first.die()
    await check(tasks, first, 600)
    assert gateway.application.router.counters["out_of_budget"] > 0
    assert gateway.application.router.num_replays == num_first


async def test_an_engine_without_room_sends_a_new_request_to_another(start_pair: Any, settle: Any) -> None:
    gateway, (first, second), _ = await start_pair(engine_wait_seconds=0.5)
    first.reject = gen.Failure(code=8, message="queue full", retry_after_ms=100)
    await check(streams(gateway, 6, 50), first, 50)
    assert len(second.submits) == 6
    second.reject = first.reject
    begin = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ids_of(gateway.stub.Generate(wanted()))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_from_call(caught.value).retry_after_s == pytest.approx(0.1)
    assert 0.4 < time.monotonic() - begin < 2.5
    assert not len(gateway.application.router.failover.waiting)


async def test_for_want_of_budget_no_stream_is_ended(start_pair: Any, settle: Any) -> None:
    """However much longer than `--engine-wait-seconds` it lasts: an engine is there."""
    gateway, (first, second), _ = await start_pair(engine_wait_seconds=0.5)
    router = gateway.application.router
    tasks = streams(gateway, 6, 600)
    await settle(lambda: len(first.slots) + len(second.slots) == 6 and len(first.slots) > 1)
    router.budget._tokens, router.budget._floor_per_s = 0.0, 0.0
    await first.die()
    await settle(lambda: len(router.failover.waiting) > 0)
    await asyncio.sleep(1.5)
    assert not any(task.done() and task.exception() for task in tasks)
    router.budget._tokens = 100.0
    await check(tasks, first, 600)
    assert router.counters["given_up"] == 0


async def test_an_engine_that_refused_a_sample_once_may_have_it_later(start_pair: Any, settle: Any) -> None:
    gateway, (first, second), _ = await start_pair(first={"step_s": 0.01}, second={"step_s": 0.01})
    first.reject = gen.Failure(code=8, message="queue full", retry_after_ms=100)
    tasks = streams(gateway, 6, 300)
    await settle(lambda: len(second.slots) == 6)
    assert gateway.application.router.counters["rerouted"] > 0
    first.reject = None
    second.announces_drain = True
    await settle(lambda: len(first.slots) == 6)
    await check(tasks, first, 300)


async def test_a_sample_goes_where_its_tokens_fit(start_pair: Any, settle: Any) -> None:
    """An engine with fewer blocks than a whole request has tokens would refuse it for good."""
    gateway, (first, second), links = await start_pair()
    first.info.num_blocks = 2
    await first.die()
    await first.start(first.address)
    await settle(lambda: all(link.is_up and link.counters.tokens == 0 for link in links))
    await settle(lambda: links[0].info.num_blocks == 2 and links[0].is_up)
    tasks = streams(gateway, 6, 600)
    await settle(lambda: links[1].counters.tokens > 50)
    await second.die()
    await asyncio.sleep(0.3)
    await second.start(second.address)
    await check(tasks, first, 600)
    assert not first.submits


async def test_a_request_that_comes_back_goes_on_in_its_own_numerics(start_pair: Any, settle: Any) -> None:
    gateway, engines, links = await start_pair(engine_wait_seconds=0.3)
    first, second = engines
    second.info.numerics_id = "another"
    await second.die()
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(1, 900))))
    await settle(lambda: links[0].counters.tokens > 20)
    await first.die()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await task
    token = error_from_call(caught.value).metadata["resume_token"]
    for engine in engines:
        await engine.start(engine.address)
    await settle(lambda: all(link.is_up for link in links))
    await ids_of(gateway.stub.Generate(pb.GenerateRequest(resume_token=token)))
    assert gateway.application.router.counters["inexact"] == 0
    assert not second.submits


async def test_an_engine_that_fails_requests_is_left_alone_while_there_is_another(
    start_pair: Any, settle: Any
) -> None:
    gateway, (first, _), (link, _) = await start_pair()
    first.reject = gen.Failure(code=13, message="a bug", error_id="e1")
    ends = [
        (await asyncio.gather(ids_of(gateway.stub.Generate(wanted(seed, 2))), return_exceptions=True))[0]
        for seed in range(40)
    ]
    failed = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert {end.code() for end in failed} == {grpc.StatusCode.INTERNAL}
    assert 3 <= len(failed) < 10
    assert link.breaker.num_opened >= 1
    metrics = gateway.application.metrics.text().decode()
    assert f'weft_gateway_engine_breaker_opened_total{{engine="{first.address}"}}' in metrics
    first.reject = None
    await settle(lambda: link.breaker.allows(gateway.application.gateway.now()))
    before = len(first.submits)
    while link.breaker.state(gateway.application.gateway.now()) is not BreakerState.CLOSED:
        await ids_of(gateway.stub.Generate(wanted(1, 2)))
    assert len(first.submits) > before


async def test_an_only_engine_is_used_whatever_its_breaker_says(gateway: Any, engine: Any) -> None:
    for _ in range(5):
        gateway.link.breaker.fail(gateway.application.gateway.now())
    assert await ids_of(gateway.stub.Generate(wanted())) == expected(engine, 1, 100)


async def test_an_engine_that_greets_and_breaks_off_is_not_called_all_the_time(
    gateway: Any, engine: Any, settle: Any
) -> None:
    steps = engine._steps

    async def abort(context: Any, *rest: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "the engine's own idea")

    engine._steps = abort
    await engine.die()
    await engine.start(engine.address)
    sessions = gateway.link.counters.sessions
    await settle(lambda: "own idea" in gateway.link.last_problem)
    await asyncio.sleep(1.0)
    assert gateway.link.counters.sessions - sessions <= 9, "0.1 s, then 0.2 s, a quarter less at most"
    engine._steps = steps
    await settle(lambda: gateway.link.is_up and bool(engine.calls))
    await asyncio.sleep(0.1)
    assert await ids_of(gateway.stub.Generate(wanted(1, 300))) == expected(engine, 1, 300)


async def test_a_stall_of_the_gateway_blames_no_engine(gateway: Any, engine: Any, settle: Any) -> None:
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(1, 600))))
    for _ in range(3):
        seen = gateway.link.counters.tokens
        await settle(lambda seen=seen: gateway.link.counters.tokens > seen + 5)
        time.sleep(1.0)  # noqa: ASYNC251 - the stall
    assert await task == expected(engine, 1, 600)
    assert gateway.link.counters.sessions == 1


async def test_a_request_that_meets_a_drain_waits_for_the_restart(
    gateway: Any, engine: Any, settle: Any
) -> None:
    engine.announces_drain = True
    await settle(lambda: gateway.link.is_draining)
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted())))
    await asyncio.sleep(0.2)
    assert not task.done()
    await engine.die()
    await engine.start(engine.address)
    assert await task == expected(engine, 1, 100)


async def test_an_engine_lost_in_the_middle_of_its_hello_is_tried_again(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(answers_hello=False)
    gateway = await start_gateway(engine, wait=False)
    for _ in range(2):
        await settle(lambda: bool(engine.calls))
        for call in list(engine.calls):
            call.cancel()
        await settle(lambda: not engine.calls)
    await settle(lambda: bool(engine.calls))
    await engine.die()
    engine.answers_hello = True
    await engine.start(engine.address)
    await settle(gateway.load.done)
    gateway.server.set_serving()
    assert await ids_of(gateway.stub.Generate(wanted())) == expected(engine, 1, 100)


async def test_room_is_told(start_pair: Any, settle: Any) -> None:
    gateway, (first, second), links = await start_pair(first={"step_s": 0.01}, second={"step_s": 0.01})
    router = gateway.application.router
    for link in links:
        link.load.max_batch_size = 3
    info = router.find("demo").info

    def room() -> int:
        places = find_places(router.usable(), info)
        return places.num_sequences if places is not None else -1

    assert room() == 2 * (3 + MIN_AHEAD)
    told = []
    router.room_listeners.append(lambda: told.append(room()))
    tasks = streams(gateway, 4, 60)
    await settle(lambda: room() == 6)
    await check(tasks, first, 60)
    await settle(lambda: bool(told) and told[-1] == 10)
    await second.die()
    await settle(lambda: room() == 5)


# -- versions ------------------------------------------------------------


@pytest.fixture
async def versions(start_engine: Any, start_gateway: Any, settle: Any) -> Any:
    async def start(**options: Any) -> Any:
        engines = {}
        for version in ("v1", "v2"):
            engine = engines[version] = await start_engine()
            engine.info.artifact_version = version
            engine.info.artifact_digest = "sha256:" + version
        gateway = await start_gateway(*engines.values(), **options)
        await settle(lambda: all(link.is_up for link in gateway.application.router.links))
        return gateway, engines

    return start


async def test_lists_show_each_version(versions: Any) -> None:
    gateway, _ = await versions()
    models = (await gateway.stub.ListModels(pb.ListModelsRequest())).models
    assert [(model.name, model.version, model.artifact_digest) for model in models] == [
        ("demo", "v1", "sha256:v1"),
        ("demo", "v2", "sha256:v2"),
    ]
    assert set(gateway.application.router.by_model()) == {"demo", "demo@v1", "demo@v2"}


async def test_a_request_may_name_a_version(versions: Any) -> None:
    gateway, engines = await versions()
    for version, engine in engines.items():
        before = len(engine.submits)
        for seed in range(5):
            await ids_of(gateway.stub.Generate(wanted(seed, 2, model=f"demo@{version}")))
        assert len(engine.submits) == before + 5
    for model in ("demo@v3", "other", "other@v1", "demo@"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ids_of(gateway.stub.Generate(wanted(1, 2, model=model)))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_request_id_gets_the_same_version_again(versions: Any) -> None:
    from services.gateway.routing.versions import parse_version_weights

    gateway, engines = await versions(version_weight=parse_version_weights("demo@v2=40%"))
    seen: dict[str, str] = {}
    for _ in range(2):
        for number in range(20):
            await ids_of(gateway.stub.Generate(wanted(1, 1, request_id=f"r{number}", model="demo")))
            for version, engine in engines.items():
                if engine.submits and engine.submits[-1].request_id == f"r{number}":
                    assert seen.setdefault(f"r{number}", version) == version
    assert set(seen.values()) == {"v1", "v2"}
    assert len(seen) == 20


async def test_a_sample_never_changes_its_version(versions: Any, settle: Any) -> None:
    gateway, engines = await versions(engine_wait_seconds=10)
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(1, 300, model="demo@v1"))))
    await settle(lambda: any(len(slot.ids) > 20 for slot in engines["v1"].slots.values()))
    await engines["v1"].die()
    await asyncio.sleep(0.5)
    assert not task.done()
    assert not engines["v2"].submits
    await engines["v1"].start(engines["v1"].address)
    assert await task == expected(engines["v1"], 1, 300)


# -- over the real scheduler ------------------------------------------------------------


async def test_prompts_go_where_they_are_cached_and_loads_are_known(
    stack: AsyncExitStack, start_gateway: Any, settle: Any
) -> None:
    engines = [
        await stack.enter_async_context(MockEngine(step_ms=1, version="v1", max_batch_size=8))
        for _ in range(2)
    ]
    gateway = await start_gateway(*engines)
    router = gateway.application.router
    await settle(lambda: all(link.is_up for link in router.links))
    prompts = [[1000 + 7 * number, *range(400, 600)] for number in range(6)]
    for _ in range(4):
        for seed, prompt in enumerate(prompts):
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt), sampling=gen.SamplingParams(seed=seed, max_tokens=4)
            )
            ids = await ids_of(gateway.stub.Generate(request))
            assert ids == expected_tokens(prompt, seed, 0, 4)
    assert router.choice.counters["prefix"] == 18
    hits = sum(engine.core.report().counters.cache_hits for engine in engines)
    assert hits >= 18 * 190
    # Heartbeats come from engines that have nothing to do, and say how fast they are.
    await settle(lambda: all(link.load.has_idle_beats for link in router.links))
    assert any(link.load.tokens_per_second > 0 for link in router.links)
    num_blocks = engines[0].core.blocks.num_blocks
    await settle(lambda: all(link.load.free_blocks == num_blocks for link in router.links))
    assert all(link.load.room(link.num_live) == 8 for link in router.links)


async def test_what_waits_on_an_engine_moves_to_one_that_joins(
    stack: AsyncExitStack, start_gateway: Any, settle: Any
) -> None:
    few = await stack.enter_async_context(MockEngine(step_ms=10, max_batch_size=2))
    other = MockEngine(step_ms=10, max_batch_size=8)
    await other.start()
    await other.kill()
    gateway = await start_gateway(few, other)
    router = gateway.application.router
    tokens = pb.TokenIds(ids=range(400, 420))
    tasks = []
    for seed in range(4):
        sampling = gen.SamplingParams(seed=seed, max_tokens=700, ignore_eos=True)
        call = gateway.stub.Generate(pb.GenerateRequest(token_ids=tokens, sampling=sampling))
        tasks.append(asyncio.create_task(ids_of(call)))
    link = next(link for link in router.links if link.is_up)
    await settle(lambda: link.num_live == 4 and link.load.num_waiting == 2)
    await stack.enter_async_context(other)
    await settle(lambda: router.counters["moves"] == 2)
    assert link.num_live <= 4
    joined = next(one for one in router.links if one is not link)
    await settle(lambda: joined.num_live == 2 and joined.counters.tokens > 10)
    assert not any(task.done() for task in tasks), "nobody had to end for that"
    for seed, ids in enumerate(await asyncio.gather(*tasks)):
        assert ids == expected_tokens(range(400, 420), seed, 0, 700)
    assert router.counters["moves"] == 2, "what runs stays"
    assert router.counters["inexact"] == 0
