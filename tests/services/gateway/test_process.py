"""The gateway as a process: flags, start before the engine, signals, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from services.gateway.config import load
from services.gateway.routing.flags import merge_repeated
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "models" / "demo"
COMMAND = [sys.executable, "-m", "services.gateway", "serve"]


class Process:
    """One gateway process; its log is read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[dict[str, Any]] = []

    async def wait_for(self, event: str, timeout_s: float = 30.0) -> dict[str, Any]:
        assert self.process.stderr is not None
        async with asyncio.timeout(timeout_s):
            while line := await self.process.stderr.readline():
                self.log.append(json.loads(line))
                if self.log[-1]["event"] == event:
                    return self.log[-1]
        raise AssertionError(f"no {event!r} in {self.log}")

    async def stub(self) -> GatewayServiceStub:
        address = (await self.wait_for("listening"))["address"]
        return GatewayServiceStub(grpc.aio.insecure_channel(address))


@pytest.fixture
async def start_process() -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    processes: list[asyncio.subprocess.Process] = []

    async def start(*flags: object) -> Process:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *map(str, flags), cwd=ROOT, stderr=asyncio.subprocess.PIPE
        )
        processes.append(process)
        return Process(process)

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.wait()


def generate(stub: Any, tokens: int) -> Any:
    return stub.Generate(
        pb.GenerateRequest(text="Once", sampling=gen.SamplingParams(seed=1, max_tokens=tokens))
    )


async def test_a_signal_lets_streams_end_and_leaves_nothing(engine: Any, start_process: Any) -> None:
    running = await start_process(
        "--listen", "127.0.0.1:0", "--engine", engine.address, "--tokenizer", DEMO, "--http", "127.0.0.1:0"
    )
    stub = await running.stub()
    await running.wait_for("serving")
    children = psutil.Process(running.process.pid).children()
    assert len(children) == 2
    tokens = 0
    async for response in generate(stub, 300):
        if response.HasField("started"):
            running.process.send_signal(signal.SIGTERM)
        tokens += len(response.delta.token_ids)
    assert tokens == 300
    stopped = await running.wait_for("stopped")
    assert stopped["begun"] == stopped["ended"]
    assert await running.process.wait() == 0
    assert not [child for child in children if child.is_running()]


async def test_a_signal_while_waiting_for_an_engine(start_process: Any) -> None:
    running = await start_process("--listen", "127.0.0.1:0", "--engine", "127.0.0.1:1", "--tokenizer", DEMO)
    stub = await running.stub()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stub, 1).read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    running.process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(running.process.wait(), 10) == 0


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["serve"], "--artifacts"),
        (["serve", "--tokenizer", "x", "--artifacts", "y"], "--artifacts"),
        (["serve", "--tokenizer", "x", "--listen", "nowhere"], "--listen"),
        (["serve", "--tokenizer", "x", "--engine", "a:b"], "--engine"),
        (["serve", "--tokenizer", "x", "--max-waiting-requests", "0"], "--max-waiting-requests"),
        (["serve", "--tokenizer", "x", "--max-request-seconds", "nan"], "--max-request-seconds"),
        (["serve", "--frobnicate"], "frobnicate"),
        (["swerve"], "usage"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], text: str) -> None:
    command = [sys.executable, "-m", "services.gateway", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag in ("--listen", "--http"):
            other = [] if flag == "--listen" else ["--listen", "127.0.0.1:0"]
            command = [*COMMAND, "--tokenizer", str(tmp_path), flag, f"127.0.0.1:{port}", *other]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
            assert result.returncode == 1
            assert "cannot listen" in result.stderr


def test_engines_may_be_named_again_and_again() -> None:
    assert merge_repeated(["--engine", "a:1", "--listen", "b:2", "--engine=c:3"]) == [
        "--listen",
        "b:2",
        "--engine",
        "a:1,c:3",
    ]
    config = load(["--tokenizer", "x", "--engine", "a:1", "--engine", "b:2,c:3"])
    assert config.engine == ("a:1", "b:2", "c:3")
