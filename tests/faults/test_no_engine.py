"""No engine is left: streams wait, then end with what was delivered and a token to go on with."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tests.faults.conftest import DEMO, SLACK_S, mock_engine, spec
from tools.chaos.calls import LOCAL, MultiplexClient, generate_events
from tools.chaos.checker import StreamCheck
from tools.chaos.clients import resumed
from tools.chaos.stack import Stack
from tools.chaos.workload import Spec, mock_expect
from weft.rpc.errors import StatusError
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

WAIT_S = 1.0


@pytest.fixture
async def stack(tmp_path: Any) -> AsyncIterator[Stack]:
    flags = ["--tokenizer", DEMO, "--engine-wait-seconds", WAIT_S]
    async with Stack([mock_engine()], tmp_path, gateway_flags=flags) as stack:
        yield stack


@pytest.fixture
async def stub(stack: Stack) -> AsyncIterator[GatewayServiceStub]:
    async with grpc.aio.insecure_channel(stack.target, options=LOCAL) as channel:
        yield GatewayServiceStub(channel)


async def read(events: Any, check: StreamCheck) -> StatusError | None:
    """Feed a checker until the end; the error that it was."""
    try:
        async with contextlib.aclosing(events):
            async for response in events:
                kind = response.WhichOneof("event")
                if kind == "delta":
                    delta = response.delta
                    check.on_delta(delta.sample_index, delta.token_ids, 0.0, text=delta.text)
                elif kind == "finish":
                    finish = response.finish
                    check.on_finish(finish.sample_index, "LENGTH", finish.usage.completion_tokens)
    except StatusError as error:
        return error
    return None


async def test_streams_wait_then_end_with_a_token_that_goes_on(
    stack: Stack, stub: GatewayServiceStub, vocabulary: Any
) -> None:
    expect = mock_expect(vocabulary)
    wanted: list[Spec] = [
        spec("greedy", temperature=0.0),
        spec("samples", num_samples=3),
        spec("multiplexed", seed=5),
    ]
    checks = [StreamCheck(one.name, list(expect(one))) for one in wanted]
    multiplex = MultiplexClient(stub)
    reads = [
        asyncio.create_task(read(open_events(one.request()), check))
        for open_events, one, check in zip(
            (lambda r: generate_events(stub, r), lambda r: generate_events(stub, r), multiplex.events),
            wanted,
            checks,
            strict=True,
        )
    ]
    async with asyncio.timeout(30):
        samples = [sample for check in checks for sample in check.samples]
        while any(len(sample.token_ids) < 6 for sample in samples):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    killed_at = time.monotonic()
    await stack.engines[0].kill()
    errors = [await one for one in reads]
    assert WAIT_S - 0.3 < time.monotonic() - killed_at < WAIT_S + 1.0 + SLACK_S
    for error, check in zip(errors, checks, strict=True):
        assert error is not None
        assert (error.code, check.problems) == (grpc.StatusCode.UNAVAILABLE, [])
        assert error.retry_after_s
        assert error.metadata["resume_token"]
    assert errors[0] is not None
    assert errors[0].reason == "ENGINE_LOST"
    assert 0 < checks[0].num_tokens < len(checks[0].samples[0].expected.token_ids)
    await multiplex.close()
    await stack.engines[0].start()
    await stack.wait_until_up(1)
    for error, one, check in zip(errors, wanted, checks, strict=True):
        assert error is not None
        again = resumed(one, error.metadata["resume_token"])
        assert await read(generate_events(stub, again), check) is None
        check.on_end()
        assert check.problems == []
    assert await stack.problems_when_idle() == []


async def test_a_new_request_is_refused_with_when_to_try_again(
    stack: Stack, stub: GatewayServiceStub, vocabulary: Any
) -> None:
    await stack.engines[0].kill()
    await asyncio.sleep(WAIT_S + 0.5)
    error = await read(generate_events(stub, spec("late").request()), StreamCheck("late", []))
    assert error is not None
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.retry_after_s
    assert await stack.problems_when_idle() == []


async def test_a_silent_engine_keeps_nobody_waiting(tmp_path: Any, vocabulary: Any) -> None:
    """One of two accepts connections and never speaks; the gateway serves with the other."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    flags = ["--tokenizer", DEMO]
    async with Stack([mock_engine()], tmp_path, gateway_flags=flags, also=[f"127.0.0.1:{port}"]) as stack:
        async with grpc.aio.insecure_channel(stack.target, options=LOCAL) as channel:
            one = spec("alone", 40)
            check = StreamCheck("alone", list(mock_expect(vocabulary)(one)))
            began = time.monotonic()
            assert await read(generate_events(GatewayServiceStub(channel), one.request()), check) is None
            check.on_end()
            assert check.problems == []
            assert time.monotonic() - began < 1.0 + SLACK_S
    silent.close()
