"""What slow readers cost the others, in latency: an engine, a gateway and these clients are processes."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.engine_service_pb2_grpc import EngineServiceStub
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

ROOT = Path(__file__).resolve().parents[4]
DEMO = ROOT / "models" / "demo"
NUM_FAST = 16
NUM_SLOW = 16
NUM_TOKENS = 200
SMALL_WINDOW = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4096),
    ("grpc.use_local_subchannel_pool", 1),
]


@asynccontextmanager
async def process(*command: object) -> AsyncIterator[str]:
    """A server; the address that it listens on, once it serves."""
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *map(str, command), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    address, drain = "", None
    try:
        assert running.stderr is not None
        async with asyncio.timeout(60):
            while line := await running.stderr.readline():
                event = json.loads(line)
                address = event.get("address", address) if event["event"] == "listening" else address
                if event["event"] == "serving":
                    break
        drain = asyncio.create_task(_drain(running.stderr))
        yield address
    finally:
        running.kill()
        await running.wait()
        if drain is not None:
            await drain


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass


async def gaps(stub: Any, seed: int) -> list[float]:
    """The times between the messages of one stream, in seconds."""
    request = pb.GenerateRequest(text="x", sampling=gen.SamplingParams(seed=seed, max_tokens=NUM_TOKENS))
    found: list[float] = []
    last = None
    async for response in stub.Generate(request):
        if response.HasField("delta"):
            now = time.perf_counter()
            if last is not None:
                found.append(now - last)
            last = now
    return found


async def p99_ms(stub: Any) -> float:
    streams = await asyncio.gather(*(gaps(stub, seed) for seed in range(NUM_FAST)))
    ordered = sorted(gap for stream in streams for gap in stream)
    return 1000 * ordered[int(0.99 * len(ordered))]


@asynccontextmanager
async def slow_readers(address: str) -> AsyncIterator[None]:
    """Clients that take one message and no more, each on a connection of its own."""
    async with AsyncExitStack() as stack:
        for seed in range(NUM_SLOW):
            channel = grpc.aio.insecure_channel(address, options=SMALL_WINDOW)
            await stack.enter_async_context(channel)
            call = GatewayServiceStub(channel).Generate(
                pb.GenerateRequest(
                    text="y", sampling=gen.SamplingParams(seed=seed, n=2, logprobs=20, max_tokens=4000)
                )
            )
            stack.callback(call.cancel)
            await call.read()
        yield


async def all_paused(engine: str) -> None:
    """Return when no sequence of a slow reader runs any more."""
    async with grpc.aio.insecure_channel(engine) as channel, asyncio.timeout(60):
        stub = EngineServiceStub(channel)
        while (await stub.GetLoad(engine_pb.GetLoadRequest())).paused < 2 * NUM_SLOW:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


@pytest.mark.slow
async def test_slow_readers_do_not_move_the_others_latency() -> None:
    """Paired rounds, without and with them; the median of the ratios."""
    engine_command = ["tools.mock_engine", "serve", "--listen", "127.0.0.1:0", "--tokenizer", DEMO]
    limits = ["--step-ms", 20, "--num-blocks", 400, "--block-size", 16, "--max-model-len", 4096]
    async with process(*engine_command, *limits) as engine:
        gateway_command = ["services.gateway", "serve", "--listen", "127.0.0.1:0", "--engine", engine]
        async with process(*gateway_command, "--tokenizer", DEMO) as address:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = GatewayServiceStub(channel)
                await p99_ms(stub)
                ratios = []
                for _ in range(5):
                    without = await p99_ms(stub)
                    async with slow_readers(address):
                        await all_paused(engine)
                        among = await p99_ms(stub)
                    ratios.append(among / without)
                    print(f"p99 between tokens: {without:.2f} ms without, {among:.2f} ms with slow readers")
                    await asyncio.sleep(0.5)
    print(f"median of the ratios: {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) < 1.05
