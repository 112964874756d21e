"""The link to the engine: who is let in, what is dropped and noticed, what becomes of lost requests."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen


def wanted(seed: int = 1, tokens: int = 100, **fields: Any) -> pb.GenerateRequest:
    sampling = gen.SamplingParams(seed=seed, max_tokens=tokens)
    return pb.GenerateRequest(text="Once upon a time", sampling=sampling, **fields)


async def ids_of(call: Any) -> tuple[list[int], Any]:
    ids: list[int] = []
    finish = None
    async for response in call:
        if response.HasField("delta"):
            ids += response.delta.token_ids
        elif response.HasField("finish"):
            finish = response.finish
    return ids, finish


def expected(engine: Any, seed: int, tokens: int) -> list[int]:
    import sys

    oracle = sys.modules[type(engine).__module__].oracle
    return [oracle(seed, 0, position) for position in range(tokens)]


async def readiness(gateway: Any) -> int:
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    status: int = (await stub.Check(health_pb2.HealthCheckRequest())).status
    return status


async def test_starts_before_its_engine(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine()
    address = engine.address
    await engine.die()
    gateway = await start_gateway(engine, wait=False)
    assert await readiness(gateway) == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ids_of(gateway.stub.Generate(wanted()))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert error_from_call(caught.value).retry_after_s is not None
    await engine.start(address)
    await settle(gateway.load.done)
    gateway.server.set_serving()
    assert await readiness(gateway) == health_pb2.HealthCheckResponse.SERVING
    assert (await ids_of(gateway.stub.Generate(wanted())))[0] == expected(engine, 1, 100)


async def test_readiness_follows_the_engine(engine: Any, start_gateway: Any, settle: Any) -> None:
    gateway = await start_gateway(engine, engine_wait_seconds=0.2)
    await engine.die()
    await settle(lambda: not gateway.link.is_up)
    assert await readiness(gateway) == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ids_of(gateway.stub.Generate(wanted()))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert error_from_call(caught.value).retry_after_s is not None
    await engine.start()
    await settle(lambda: gateway.link.is_up)
    assert await readiness(gateway) == health_pb2.HealthCheckResponse.SERVING


async def test_another_tokenizer_is_refused(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine()
    engine.info.tokenizer_digest = "sha256:" + "0" * 64
    gateway = await start_gateway(engine, wait=False)
    await settle(lambda: "refused" in gateway.link.last_problem)
    assert "tokenizer digest differs" in gateway.link.last_problem
    assert not gateway.load.done()
    assert await readiness(gateway) == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_version_that_is_not_there_is_refused(
    start_engine: Any, start_gateway: Any, settle: Any, tmp_path: Path
) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, wait=False, artifacts=tmp_path)
    await settle(lambda: "refused" in gateway.link.last_problem)
    assert "demo" in gateway.link.last_problem


async def test_an_engine_that_says_nothing_is_left(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(answers_hello=False)
    gateway = await start_gateway(engine, wait=False)
    await settle(lambda: "no Hello" in gateway.link.last_problem)


async def test_wrong_epochs_are_dropped_and_counted(gateway: Any, engine: Any, settle: Any) -> None:
    engine.wrong_epoch = True
    call = gateway.stub.Generate(wanted())
    task = asyncio.create_task(ids_of(call))
    await settle(lambda: gateway.link.counters.dropped_epoch > 5)
    assert gateway.link.counters.tokens == 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    engine.wrong_epoch = False


async def test_doubled_tokens_are_dropped_and_counted(gateway: Any, engine: Any) -> None:
    engine.repeat_tokens = True
    ids, finish = await ids_of(gateway.stub.Generate(wanted()))
    assert ids == expected(engine, 1, 100)
    assert finish.usage.completion_tokens == 100
    assert gateway.link.counters.dropped_position == 100


async def test_a_missing_token_is_drawn_again(gateway: Any, engine: Any) -> None:
    engine.skip_position = 20
    ids, _ = await ids_of(gateway.stub.Generate(wanted()))
    assert ids == expected(engine, 1, 100)
    assert gateway.link.counters.holes == 1
    assert list(engine.submits[1].emitted_token_ids) == ids[:20]
    assert not engine.violations


async def test_a_missing_last_token_is_drawn_again(gateway: Any, engine: Any) -> None:
    engine.skip_position = 99
    ids, finish = await ids_of(gateway.stub.Generate(wanted()))
    assert ids == expected(engine, 1, 100)
    assert finish.reason == gen.FINISH_REASON_LENGTH


async def test_requests_outlive_their_engine(gateway: Any, engine: Any, settle: Any) -> None:
    """The same tokens, none lost or doubled, when the engine dies in the middle and comes back."""
    tasks = [asyncio.create_task(ids_of(gateway.stub.Generate(wanted(seed, 200)))) for seed in range(16)]
    await settle(lambda: gateway.link.counters.tokens > 500)
    await engine.die()
    await asyncio.sleep(0.2)
    await engine.start()
    for seed, (ids, finish) in enumerate(await asyncio.gather(*tasks)):
        assert ids == expected(engine, seed, 200)
        assert finish.usage.completion_tokens == 200
    assert gateway.application.router.num_replays >= 16
    # What was delivered is not drawn again.
    assert all(submit.emitted_token_ids for submit in engine.submits[-16:])
    assert gateway.link.counters.dropped_position == 0


async def test_requests_move_to_another_engine(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    first, second = await start_engine(), await start_engine()
    gateway = await start_gateway(first, second)
    await settle(lambda: all(link.is_up for link in gateway.application.router.links))
    tasks = [asyncio.create_task(ids_of(gateway.stub.Generate(wanted(seed, 300)))) for seed in range(16)]
    await settle(lambda: len(first.slots) == len(second.slots) == 8)
    await first.die()
    for seed, (ids, _) in enumerate(await asyncio.gather(*tasks)):
        assert ids == expected(first, seed, 300)
    assert await readiness(gateway) == health_pb2.HealthCheckResponse.SERVING


async def test_an_engine_that_stays_away_ends_its_requests(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=0.3)
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted())))
    await settle(lambda: gateway.link.counters.tokens > 5)
    await engine.die()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await task
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert error_from_call(caught.value).retry_after_s is not None


async def test_a_new_request_waits_for_an_engine_that_was_lost_a_moment_ago(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=5)
    await engine.die()
    await settle(lambda: not gateway.link.is_up)
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted())))
    other = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(2))))
    unknown = wanted()
    unknown.model = "no-such-model"
    with pytest.raises(grpc.aio.AioRpcError):
        await ids_of(gateway.stub.Generate(unknown))
    await asyncio.sleep(0.2)
    assert not task.done()
    assert not other.done()
    await engine.start()
    assert (await task)[0] == expected(engine, 1, 100)
    assert (await other)[0] == expected(engine, 2, 100)


async def test_a_new_request_does_not_wait_longer_than_those_that_were_running(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=0.4)
    await engine.die()
    await settle(lambda: not gateway.link.is_up)
    for most_s in (2.0, 0.3):  # the second comes when the wait is over
        begin = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ids_of(gateway.stub.Generate(wanted()))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert error_from_call(caught.value).retry_after_s is not None
        assert time.monotonic() - begin < most_s


async def test_who_lost_an_engine_waits_for_a_place_in_a_full_one(
    gateway: Any, engine: Any, settle: Any
) -> None:
    tasks = [asyncio.create_task(ids_of(gateway.stub.Generate(wanted(seed, 200)))) for seed in range(8)]
    await settle(lambda: gateway.link.counters.tokens > 200)
    engine.reject = gen.Failure(code=8, message="queue full", retry_after_ms=100)
    await engine.die()
    await engine.start()
    # Far more refusals than a sample may be started.
    await settle(lambda: len(engine.submits) > 8 * 8)
    # A new one has passed the gateway's own door, and waits like the others.
    num_before = len(engine.submits)
    tasks.append(asyncio.create_task(ids_of(gateway.stub.Generate(wanted(8, 200, request_id="new")))))
    await settle(lambda: sum(submit.request_id == "new" for submit in engine.submits[num_before:]) > 1)
    engine.reject = None
    for seed, (ids, _) in enumerate(await asyncio.gather(*tasks)):
        assert ids == expected(engine, seed, 200)


async def test_waiting_for_a_place_ends(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=0.6)
    late = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(2, 900), timeout=3)))
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(tokens=900))))
    await settle(lambda: gateway.link.counters.tokens > 20)
    engine.reject = gen.Failure(code=8, message="queue full", retry_after_ms=20)
    await engine.die()
    await engine.start()
    begin = time.monotonic()
    for call in (task, late):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert 0.3 < time.monotonic() - begin < 2.0
    assert not len(gateway.application.router.failover.waiting)


async def test_a_request_that_kills_engines_is_given_up(gateway: Any, engine: Any, settle: Any) -> None:
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(tokens=900))))
    for number in range(1, 5):
        await settle(lambda number=number: len(engine.submits) == number)
        await engine.die()
        await engine.start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await task
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert len(engine.submits) == 4


async def test_a_replay_refused_for_its_deadline_ends_as_any_deadline(
    gateway: Any, engine: Any, settle: Any
) -> None:
    """Tokens were delivered, so it is an end with status OK and usage, never DEADLINE_EXCEEDED."""
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(tokens=900), timeout=8)))
    await settle(lambda: gateway.link.counters.tokens > 20)
    engine.reject = gen.Failure(code=4, message="0.1 s are left; about 0.5 s are needed")
    await engine.die()
    await engine.start()
    ids, finish = await task
    assert finish.reason == gen.FINISH_REASON_DEADLINE
    assert finish.usage.completion_tokens == len(ids) > 20
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ids_of(gateway.stub.Generate(wanted(), timeout=8))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "needed" in caught.value.details()


async def test_an_end_without_a_reason_is_internal_with_an_id(
    gateway: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gen, "FINISH_REASON_LENGTH", gen.FINISH_REASON_UNSPECIFIED)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ids_of(gateway.stub.Generate(wanted(tokens=3)))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    error_id = error_from_call(caught.value).error_id
    assert error_id
    assert error_id in caught.value.details()


async def test_a_link_outlives_whatever_happens_on_it(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, wait=False)
    load = gateway.link._load_assets
    tries = 0

    async def failing(info: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OverflowError("a secret of the file")
        return await load(info)

    gateway.link._load_assets = failing
    await settle(gateway.load.done)
    gateway.server.set_serving()
    assert gateway.link.is_up
    assert (await ids_of(gateway.stub.Generate(wanted())))[0] == expected(engine, 1, 100)


async def test_a_dead_engine_is_noticed(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=0)
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted())))
    await settle(lambda: gateway.link.counters.tokens > 5)
    engine.is_hanging = True
    begin = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await task
    assert 0.4 < time.monotonic() - begin < 2.0
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "dead" in gateway.link.last_problem
    engine.is_hanging = False


async def test_a_hung_step_is_noticed_while_the_heart_beats(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=0)
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted())))
    await settle(lambda: gateway.link.counters.tokens > 5)
    engine.is_hung = True
    with pytest.raises(grpc.aio.AioRpcError):
        await task
    assert "hung" in gateway.link.last_problem
    engine.is_hung = False


async def test_an_idle_engine_need_not_beat(gateway: Any, engine: Any) -> None:
    await asyncio.sleep(1.0)
    assert gateway.link.is_up
    assert gateway.link.counters.sessions == 1
    assert (await ids_of(gateway.stub.Generate(wanted())))[0] == expected(engine, 1, 100)


async def test_credit_is_returned(start_engine: Any, start_gateway: Any) -> None:
    """Far more bytes than the first credit pass."""
    engine = await start_engine(steps_per_frame=16)
    gateway = await start_gateway(engine)
    gateway.link._credit_bytes = 4096
    gateway.link._multiplexer._credit_bytes = 4096
    engine.credit = 4096
    await asyncio.gather(*(ids_of(gateway.stub.Generate(wanted(seed, 900))) for seed in range(16)))
    assert not engine.violations


async def test_a_slow_client_pauses_its_own_slots_only(gateway: Any, engine: Any, settle: Any) -> None:
    options = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 4096),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(str(gateway.server.address), options=options) as channel:
        call = type(gateway.stub)(channel).Generate(
            pb.GenerateRequest(text="x", sampling=gen.SamplingParams(n=8, seed=4, logprobs=20))
        )
        async for response in call:
            if response.HasField("delta"):
                break
        await settle(lambda: engine.pauses >= 8, 20)
        drawn = [len(slot.ids) for slot in engine.slots.values()]
        await asyncio.sleep(0.2)
        assert [len(slot.ids) for slot in engine.slots.values()] == drawn
        assert max(drawn) < 1000
        begin = time.monotonic()
        assert (await ids_of(gateway.stub.Generate(wanted())))[0] == expected(engine, 1, 100)
        assert time.monotonic() - begin < 3.0
        counts = [0] * 8
        async for response in call:
            if response.HasField("delta"):
                counts[response.delta.sample_index] += len(response.delta.token_ids)
        assert engine.resumes >= 8
        assert sum(counts) > 8 * 1000


async def test_a_client_that_never_reads_is_given_up(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(steps_per_frame=8)
    gateway = await start_gateway(engine, slow_client_seconds=0.3)
    options = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 4096),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(str(gateway.server.address), options=options) as channel:
        call = type(gateway.stub)(channel).Generate(
            pb.GenerateRequest(text="x", sampling=gen.SamplingParams(n=8, seed=4, logprobs=20))
        )
        await settle(lambda: engine.pauses > 0, 20)
        await settle(lambda: not engine.slots, 20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ids_of(call)
        assert caught.value.code() == grpc.StatusCode.ABORTED


async def test_a_draining_gateway_finishes_what_runs(gateway: Any, engine: Any, settle: Any) -> None:
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(tokens=200))))
    await settle(lambda: gateway.link.counters.tokens > 5)
    drain = asyncio.create_task(gateway.application.drain())
    await asyncio.sleep(0.01)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ids_of(gateway.stub.Generate(wanted()))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    await drain
    assert (await task)[0] == expected(engine, 1, 200)


async def test_the_queue_is_bounded(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine(step_s=0.5)
    gateway = await start_gateway(engine, max_waiting_requests=4)
    tasks = [asyncio.create_task(ids_of(gateway.stub.Generate(wanted(seed, 2)))) for seed in range(4)]
    await settle(lambda: gateway.application.gateway.admission.num_waiting == 4)
    begin = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ids_of(gateway.stub.Generate(wanted()))
    assert time.monotonic() - begin < 0.1
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_from_call(caught.value).retry_after_s == 1.0
    await asyncio.gather(*tasks)
    engine.step_s = 0.002
    await ids_of(gateway.stub.Generate(wanted()))


async def test_metrics_balance(gateway: Any, engine: Any) -> None:
    await ids_of(gateway.stub.Generate(wanted()))
    text = gateway.application.metrics.text().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    assert values["weft_gateway_requests_begun_total"] == "1.0"
    assert values['weft_gateway_requests_ended_total{code="OK"}'] == "1.0"
    assert values["weft_gateway_time_to_first_token_seconds_count"] == "1.0"
    engine_label = json.dumps(str(engine.address))
    assert values[f"weft_gateway_link_tokens_total{{engine={engine_label}}}"] == "100.0"


async def test_what_a_drain_cuts_short_goes_on_elsewhere(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    first, second = await start_engine(), await start_engine()
    gateway = await start_gateway(first, second)
    await settle(lambda: all(link.is_up for link in gateway.application.router.links))
    tasks = [asyncio.create_task(ids_of(gateway.stub.Generate(wanted(seed, 300)))) for seed in range(8)]
    await settle(lambda: len(first.slots) == len(second.slots) == 4)
    first.announces_drain = True
    await settle(lambda: gateway.link.is_draining)
    for slot in first.slots.values():
        slot.is_cancelled = True
    first.reject = gen.Failure(code=14, message="draining")
    for seed, (ids, finish) in enumerate(await asyncio.gather(*tasks)):
        assert ids == expected(first, seed, 300)
        assert finish.reason == gen.FINISH_REASON_LENGTH
