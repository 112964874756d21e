"""The engine as a process: start, serve, drain, fault."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.services.engine.core.oracle import next_token
from tests.services.engine.process import ROOT
from weft.rpc import auth
from weft.rpc.channel import open_channel
from weft.rpc.healthcheck import check
from weft.v1 import engine_service_pb2 as pb
from weft.v1 import generation_pb2
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

PROMPT = [5, 4, 3, 2, 1]
HELLO = pb.ConnectRequest(hello=pb.GatewayHello(protocol_version=1, initial_credit_bytes=1 << 20))


def request(max_tokens: int, prompt: list[int] = PROMPT) -> pb.GenerateTokensRequest:
    params = generation_pb2.SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True, temperature=0)
    return pb.GenerateTokensRequest(prompt_token_ids=prompt, sampling=params)


def oracle(num_tokens: int) -> list[int]:
    output: list[int] = []
    while len(output) < num_tokens:
        output.append(next_token(PROMPT + output, 1, 0))
    return output


async def read_all(call: Any) -> tuple[list[int], Any]:
    tokens: list[int] = []
    last = None
    async for last in call:
        tokens += last.token_ids
    return tokens, last


async def test_sigterm_lets_what_runs_finish_and_exits_zero(engine):
    process = engine(mood="slow")
    address = process.serving()
    async with open_channel(address) as channel:
        call = EngineServiceStub(channel).GenerateTokens(request(60))
        link = EngineServiceStub(channel).Connect()
        await link.write(HELLO)
        assert (await link.read()).WhichOneof("event") == "hello"
        params = generation_pb2.SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
        submit = pb.Submit(slot=3, prompt_token_ids=PROMPT, sampling=params)
        await link.write(pb.ConnectRequest(submit=submit))
        assert (await link.read()).WhichOneof("event") == "accepted"
        process.popen.send_signal(signal.SIGTERM)
        tokens, last = await read_all(call)
        assert tokens == oracle(60)
        assert last.finished.reason == generation_pb2.FINISH_REASON_LENGTH
        from_link: list[int] = []
        was_announced = is_finished = False
        ended: grpc.aio.AioRpcError | None = None
        try:
            while (message := await link.read()) is not grpc.aio.EOF:
                was_announced |= message.HasField("draining")
                from_link += message.frame.token_ids
                is_finished |= bool(message.frame.finished)
        except grpc.aio.AioRpcError as error:
            ended = error
        assert ended is not None
        assert ended.code() is grpc.StatusCode.UNAVAILABLE
        assert was_announced
        assert is_finished
        assert from_link == oracle(60)
    assert process.end() == 0
    assert process.event("sequences") | {"time": ""} == {
        "time": "", "level": "info", "logger": "engine", "event": "sequences", "begun": 2, "ended": 2,
        "live": 0,
    }  # fmt: skip
    assert process.event("stopped")["begun"] == process.event("stopped")["ended"] == 2


async def test_a_drain_that_takes_too_long_cancels(engine):
    process = engine("--drain-seconds", 0.3, mood="slow")
    async with open_channel(process.serving()) as channel:
        call = EngineServiceStub(channel).GenerateTokens(request(1_900))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.end() == 0
        assert time.monotonic() - started < 5


async def test_a_device_fault_ends_streams_as_unavailable_and_the_process_with_70(engine):
    process = engine(mood="fault")
    async with open_channel(process.serving()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(EngineServiceStub(channel).GenerateTokens(request(1_000)))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "0xdeadbeef" not in caught.value.details()
    assert process.end() == 70
    assert any("0xdeadbeef" in event.get("stack", "") for event in process.events)


async def test_health_follows_a_step_that_hangs_and_comes_back(engine, monkeypatch):
    process = engine(mood="hang")
    address = process.serving()
    async with open_channel(address) as channel:
        call = EngineServiceStub(channel).GenerateTokens(request(50))
        reading = asyncio.ensure_future(read_all(call))
        await asyncio.to_thread(process.wait_for, "step hangs")
        assert await asyncio.to_thread(check, address, "", 2) == "NOT_SERVING"
        await asyncio.to_thread(process.wait_for, "step has ended after all")
        assert await asyncio.to_thread(check, address, "", 2) == "SERVING"
        tokens, _ = await reading
        assert tokens == oracle(50)


def test_a_signal_while_the_model_loads_exits_zero_at_once(engine):
    process = engine(mood="stuck")
    address = process.wait_for("listening")["address"]
    assert check(address, "", 2) == "NOT_SERVING"
    process.popen.send_signal(signal.SIGTERM)
    assert process.end(5) == 0


async def test_a_key_file_guards_the_engine(engine, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"gateway:{auth.hash_key('sesame')}\n")
    process = engine("--api-key-file", keys, mood="ok")
    address = process.serving()
    assert check(address, "", 2) == "SERVING"
    async with open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await EngineServiceStub(channel).GetInfo(pb.GetInfoRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    async with open_channel(address, "sesame") as channel:
        assert (await EngineServiceStub(channel).GetInfo(pb.GetInfoRequest())).model_name == "oracle"
    assert "sesame" not in "".join(process.lines)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")
async def test_an_idle_engine_uses_hardly_any_time(engine):
    process = engine(mood="ok")
    async with open_channel(process.serving()) as channel:
        await read_all(EngineServiceStub(channel).GenerateTokens(request(20)))
        await asyncio.sleep(0.3)

        def seconds() -> float:
            fields = Path(f"/proc/{process.popen.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = seconds()
        await asyncio.sleep(3)
        # One per cent of a core, and one tick of the clock that measures it.
        assert seconds() - before <= 0.03 + 0.01


async def test_the_demo_model_end_to_end(engine):
    process = engine(
        "--source",
        ROOT / "models" / "demo",
        "--metrics",
        "127.0.0.1:0",
        "--threads",
        1,
        "--kv-memory",
        "64MiB",
    )
    metrics = process.wait_for("metrics")["address"]
    async with open_channel(process.serving()) as channel:
        stub = EngineServiceStub(channel)
        info = await stub.GetInfo(pb.GetInfoRequest())
        assert info.model_name == "demo"
        assert info.num_blocks * info.block_size * info.kv_bytes_per_token <= 64 << 20
        prompt = list(range(100, 140))
        alone, last = await read_all(stub.GenerateTokens(request(24, prompt)))
        assert len(alone) == 24
        assert last.finished.usage.completion_tokens == 24
        again = await asyncio.gather(*(read_all(stub.GenerateTokens(request(24, prompt))) for _ in range(4)))
        assert [tokens for tokens, _ in again] == [alone] * 4
        link = stub.Connect()
        await link.write(HELLO)
        params = request(24).sampling
        submit = pb.Submit(slot=1, prompt_token_ids=prompt, sampling=params, emitted_token_ids=alone[:7])
        await link.write(pb.ConnectRequest(submit=submit))
        resumed: list[int] = []
        while True:
            message = await link.read()
            resumed += message.frame.token_ids
            if message.frame.finished:
                break
        link.cancel()
        assert resumed == alone[7:]
    # Counted after the tokens have been handed out.
    wanted = 'vllm:request_success_total{finished_reason="length",model_name="demo"} 6.0'
    page = ""
    for _ in range(100):
        page = (await asyncio.to_thread(urllib.request.urlopen, f"http://{metrics}/metrics")).read().decode()
        if wanted in page:
            break
        await asyncio.sleep(0.05)
    assert wanted in page
    assert 'vllm:generation_tokens_total{model_name="demo"} 137.0' in page
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 0
