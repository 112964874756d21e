"""Quotas, the queue and its order through a whole gateway, with an engine that runs four requests at once."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.gateway import resolution
from weft.rpc.address import parse_address
from weft.rpc.auth import ANYBODY, Authenticator, Caller, auth_metadata, hash_key
from weft.rpc.errors import PUSHBACK_KEY, StatusError, error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

BATCH = 4
AHEAD = 2


def ask(max_tokens: int = 4, **fields: Any) -> pb.GenerateRequest:
    sampling = gen.SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    ids = pb.TokenIds(ids=fields.pop("ids", [300] * 10))
    return pb.GenerateRequest(token_ids=ids, sampling=sampling, **fields)


async def run(gateway: Any, request: pb.GenerateRequest, caller: Caller = ANYBODY, **how: Any) -> int:
    """Read a request to its end; how many tokens came."""
    tokens = 0
    core = gateway.application.gateway
    async with core.open(request, caller=caller, budget_s=how.get("budget_s")) as live:
        await live.admitted()
        while (updates := await live.next_updates()) is not None:
            tokens += sum(len(update.token_ids) for update in updates)
    return tokens


async def refused(
    gateway: Any, request: pb.GenerateRequest, caller: Caller = ANYBODY, **how: Any
) -> StatusError:
    with pytest.raises(StatusError) as caught:
        await run(gateway, request, caller, **how)
    return caught.value


@pytest.fixture
async def busy_engine(start_engine: Any) -> Any:
    engine = await start_engine(step_s=0.005)
    engine.info.max_batch_size = BATCH
    engine.info.max_queue_size = 64
    return engine


@pytest.fixture
async def stalled(busy_engine: Any, start_gateway: Any, settle: Any, stack: Any) -> Any:
    """A gateway whose engine has all it takes and gives nothing."""
    gateway = await start_gateway(busy_engine, http=parse_address("127.0.0.1:0"), max_waiting_requests=12)
    busy_engine.is_hanging = True
    hogs = [asyncio.create_task(run(gateway, ask())) for _ in range(BATCH + AHEAD)]

    async def end() -> None:
        for hog in hogs:
            hog.cancel()
        await asyncio.gather(*hogs, return_exceptions=True)

    stack.push_async_callback(end)
    dispatcher = gateway.application.gateway.dispatcher
    await settle(lambda: sum(len(pool.running) for pool in dispatcher._pools.values()) == BATCH + AHEAD)
    return gateway


async def test_requests_a_second_over_grpc(start_gateway: Any, engine: Any) -> None:
    gateway = await start_gateway(engine, key_requests_per_second=0.01)
    assert [r async for r in gateway.stub.Generate(ask())]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.Generate(ask()).read()
    error = error_from_call(caught.value)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.reason == "QUOTA_EXCEEDED"
    assert error.metadata == {"quota": "requests_per_second", "limit": "0.01"}
    assert error.retry_after_s == pytest.approx(100, abs=10)
    pushback = dict(caught.value.trailing_metadata() or ())[PUSHBACK_KEY]
    assert int(pushback) == round(1000 * error.retry_after_s)


async def test_limits_of_the_key_file_hold_and_follow_it(
    start_gateway: Any, engine: Any, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    line = f"slow:{hash_key('k-slow')} requests_per_second="
    other = f"fast:{hash_key('k-fast')}\n"
    path.write_text(f"{line}0.01\n{other}")
    keys = Authenticator.from_file(path)
    gateway = await start_gateway(engine, authenticator=keys)

    async def generate(key: str) -> int:
        call = gateway.stub.Generate(ask(), metadata=auth_metadata(key))
        return len([response async for response in call])

    assert await generate("k-slow")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate("k-slow")
    assert error_from_call(caught.value).reason == "QUOTA_EXCEEDED"
    for _ in range(3):
        assert await generate("k-fast")
    path.write_text(f"{line}100\n{other}")
    keys.reload()
    for _ in range(3):
        assert await generate("k-slow")


async def test_who_comes_back_when_told_is_let_in(gateway: Any) -> None:
    caller = Caller("a", requests_per_second=4)
    account = gateway.application.gateway.admission.quotas.account(caller, asyncio.get_running_loop().time())
    account.requests.take(4, asyncio.get_running_loop().time())
    error = await refused(gateway, ask(), caller)
    assert error.retry_after_s
    assert 0.1 < error.retry_after_s <= 0.25
    await asyncio.sleep(error.retry_after_s)
    await run(gateway, ask(), caller)


async def test_over_quota_is_said_before_anything_is_tokenized(
    gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller("a", tokens_per_minute=60, max_streams=1)
    await run(gateway, ask(max_tokens=30, ids=[300] * 30), caller)

    async def tokenize(*_: Any) -> list[int]:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(resolution, "tokenize", tokenize)
    error = await refused(gateway, ask(max_tokens=30), caller)
    assert error.metadata["quota"] == "tokens_per_minute"
    assert error.retry_after_s == pytest.approx(40, abs=5)


async def test_tokens_not_drawn_are_given_back(gateway: Any, engine: Any) -> None:
    engine.say("Hi.")
    caller = Caller("a", tokens_per_minute=600)
    request = pb.GenerateRequest(text="Once", sampling=gen.SamplingParams(max_tokens=500))
    for _ in range(5):
        await run(gateway, request, caller)
    account = gateway.application.gateway.admission.quotas.account(caller, 0.0)
    used = 600 - account.tokens.level(account.tokens._at)
    assert 0 < used < 100
    assert account.num_streams == 0
    (tokens,) = (t for name, t in gateway.application.gateway.usage.items() if name == "a")
    assert tokens.completion == 5 * (len(engine.text_ids) + 1)


async def test_a_request_too_large_for_what_is_left_is_refused_when_its_size_is_known(gateway: Any) -> None:
    caller = Caller("a", tokens_per_minute=600, requests_per_second=100)
    request = pb.GenerateRequest(text="Once upon a time " * 20, sampling=gen.SamplingParams(max_tokens=500))
    engine_is_slow = asyncio.create_task(run(gateway, ask(max_tokens=90), caller))
    await asyncio.sleep(0)
    error = await refused(gateway, request, caller)
    assert error.metadata["quota"] == "tokens_per_minute"
    await engine_is_slow


async def test_streams_at_once(gateway: Any, engine: Any) -> None:
    caller = Caller("a", max_streams=1)
    async with gateway.application.gateway.open(ask(max_tokens=100), caller=caller, budget_s=None) as live:
        await live.admitted()
        error = await refused(gateway, ask(), caller)
        assert error.metadata["quota"] == "max_streams"
        await run(gateway, ask(), Caller("b", max_streams=1))
    await run(gateway, ask(), caller)


async def test_health_answers_while_the_queue_is_full(stalled: Any, settle: Any) -> None:
    admission = stalled.application.gateway.admission
    waiting = [asyncio.create_task(run(stalled, ask())) for _ in range(12 - BATCH - AHEAD)]
    await settle(lambda: admission.num_waiting == 12)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stalled.stub.Generate(ask()).read()
    error = error_from_call(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert error.retry_after_s

    health = health_pb2_grpc.HealthStub(stalled.channel)
    asked = health_pb2.HealthCheckRequest()
    assert (await health.Check(asked, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(asked, timeout=5)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    with await asyncio.to_thread(urllib.request.urlopen, f"{stalled.http_url}/healthz", timeout=5) as answer:
        assert json.load(answer)["status"] == "ok"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await settle(lambda: admission.num_waiting == BATCH + AHEAD)


async def test_a_queued_request_that_is_cancelled_leaves_at_once(
    stalled: Any, busy_engine: Any, settle: Any
) -> None:
    dispatcher = stalled.application.gateway.dispatcher
    queued = [asyncio.create_task(run(stalled, ask(request_id=f"q{number}"))) for number in range(3)]
    await settle(lambda: dispatcher.num_waiting == 3)
    await stalled.stub.Cancel(pb.CancelRequest(request_id="q1"))
    assert await asyncio.wait_for(queued[1], 5) == 0
    assert dispatcher.num_waiting == 2
    queued[2].cancel()
    await asyncio.gather(queued[2], return_exceptions=True)
    assert dispatcher.num_waiting == 1
    busy_engine.is_hanging = False
    assert await asyncio.wait_for(queued[0], 10) == 4
    assert {s.request_id for s in busy_engine.submits} & {"q0", "q1", "q2"} == {"q0"}


async def test_a_deadline_in_the_queue_never_reaches_an_engine(stalled: Any, busy_engine: Any) -> None:
    error = await refused(stalled, ask(request_id="late"), budget_s=0.1)
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert all(submit.request_id != "late" for submit in busy_engine.submits)
    assert stalled.application.gateway.dispatcher.num_waiting == 0


async def test_interactive_goes_before_normal_before_batch(
    stalled: Any, busy_engine: Any, settle: Any
) -> None:
    names = [("batch", 7), ("normal", 0), ("interactive", -3)]
    tasks = [
        asyncio.create_task(run(stalled, ask(request_id=name, priority=priority))) for name, priority in names
    ]
    await settle(lambda: stalled.application.gateway.dispatcher.num_waiting == 3)
    busy_engine.is_hanging = False
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    started = [s.request_id for s in busy_engine.submits if s.request_id in dict(names)]
    assert started == ["interactive", "normal", "batch"]


@pytest.mark.parametrize("weight", [1.0, 3.0])
async def test_two_keys_of_different_load_are_served_by_weight(
    busy_engine: Any, start_gateway: Any, weight: float
) -> None:
    gateway = await start_gateway(busy_engine)
    service = {"heavy": 0, "light": 0}
    is_enough = asyncio.Event()

    async def client(caller: Caller, number: int) -> None:
        for turn in range(1000):
            num_prompt = 5 + (number * turn) % 11
            request = ask(4 + (number + turn) % 7, ids=[300] * num_prompt)
            num_tokens = await run(gateway, request, caller)
            service[caller.name or ""] += num_prompt + 2 * num_tokens
            if sum(service.values()) > 6000:
                is_enough.set()

    # As many of the light key's as keep it waiting, ten times as many of the other's.
    clients = [client(Caller("light", weight=weight), number) for number in range(10)]
    clients += [client(Caller("heavy"), number) for number in range(100)]
    tasks = [asyncio.create_task(work) for work in clients]
    async with asyncio.timeout(60):
        await is_enough.wait()
    share = service["light"] / sum(service.values())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(service, f"share {share:.3f}, by weight {weight / (1 + weight):.3f}")
    assert share == pytest.approx(weight / (1 + weight), rel=0.1)


async def test_an_engine_is_kept_busy_while_requests_wait(busy_engine: Any, start_gateway: Any) -> None:
    gateway = await start_gateway(busy_engine)
    await asyncio.gather(*(run(gateway, ask(8)) for _ in range(40)))
    assert max(submit.slot for submit in busy_engine.submits) < BATCH + AHEAD
    assert gateway.application.gateway.dispatcher.num_queued_ever >= 40 - BATCH - AHEAD
    assert gateway.application.gateway.dispatcher.num_waiting == 0


async def test_slow_readers_take_nobodys_place(
    busy_engine: Any, start_gateway: Any, settle: Any, stack: Any
) -> None:
    busy_engine.step_s = 0.001
    gateway = await start_gateway(busy_engine)
    core = gateway.application.gateway
    for _ in range(BATCH + AHEAD):
        slow = core.open(ask(1000), caller=ANYBODY, budget_s=None)
        await (await stack.enter_async_context(slow)).admitted()
    await settle(lambda: busy_engine.pauses == BATCH + AHEAD, 20)
    assert await asyncio.wait_for(run(gateway, ask(20)), 10) == 20


async def test_metrics_name_queues_refusals_and_keys(stalled: Any, busy_engine: Any, settle: Any) -> None:
    core = stalled.application.gateway
    keyed = Caller("team-a", max_streams=1)
    waiting = [
        asyncio.create_task(run(stalled, ask(), keyed)),
        asyncio.create_task(run(stalled, ask(priority=5))),
    ]
    await settle(lambda: core.dispatcher.num_waiting == 2)
    await refused(stalled, ask(), keyed)
    text = stalled.application.metrics.text().decode()
    assert 'weft_gateway_queue_length{model="demo",priority="normal"} 1.0' in text
    assert 'weft_gateway_queue_length{model="demo",priority="batch"} 1.0' in text
    assert 'weft_gateway_queue_length{model="demo",priority="interactive"} 0.0' in text
    assert 'vllm:num_requests_waiting{model_name="demo"} 2.0' in text
    assert 'weft_gateway_requests_refused_total{reason="QUOTA_EXCEEDED"} 1.0' in text
    assert 'weft_gateway_requests_refused_total{reason="QUEUE_FULL"} 0.0' in text
    busy_engine.is_hanging = False
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    text = stalled.application.metrics.text().decode()
    assert 'weft_gateway_key_tokens_total{key="team-a",kind="prompt"} 10.0' in text
    assert 'weft_gateway_key_tokens_total{key="team-a",kind="completion"} 4.0' in text
    assert 'weft_gateway_key_tokens_total{key="(none)",kind="completion"}' in text
    assert 'weft_gateway_queue_seconds_count{priority="batch"} 1.0' in text
