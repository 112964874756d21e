"""Random histories of sessions: evictions, engines killed and started, clients that leave, new gateways.
Each turn's tokens equal a stateless run over the ids that its session held.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from services.gateway.application import GatewayApplication
from services.gateway.config import GatewayConfig
from tests.services.gateway.conftest import DEMO, FAST
from tools.mock_engine import MockEngine
from tools.mock_engine.oracle import expected_tokens
from weft.rpc.address import parse_address
from weft.rpc.server import Server
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

NUM_SESSIONS = 3
MAX_MODEL_LEN = 512


class World:
    """Two engines of one artifact with little cache, a gateway with a file; what a careful client knows."""

    def __init__(self, rng: random.Random, stack: AsyncExitStack, path: Any) -> None:
        self.rng, self.stack, self.path = rng, stack, path
        self.engines = [
            MockEngine(step_ms=1, num_blocks=40, block_size=16, max_model_len=MAX_MODEL_LEN) for _ in range(2)
        ]
        self.is_up = [False, False]
        self.histories: dict[str, list[int]] = {}
        self.gateway: GatewayApplication | None = None
        self.num_kept = self.num_cut = self.num_cached = self.num_kills = self.num_restarts = 0

    async def start(self) -> None:
        for index in range(2):
            await self.start_engine(index)
            self.stack.push_async_callback(self.kill_engine, index)
        await self.start_gateway()
        self.stack.push_async_callback(self.stop_gateway)

    async def start_engine(self, index: int) -> None:
        if not self.is_up[index]:
            await self.engines[index].start()
            self.is_up[index] = True

    async def kill_engine(self, index: int) -> None:
        if self.is_up[index]:
            self.is_up[index] = False
            await self.engines[index].kill()

    async def start_gateway(self) -> None:
        config = GatewayConfig(
            engine=tuple(str(engine.address) for engine in self.engines),
            tokenizer=DEMO,
            sessions=self.path,
            drain_seconds=2.0,
            engine_wait_seconds=20.0,
            session_retain_seconds=self.rng.choice((0, 300)),
        )
        self.gateway = GatewayApplication(config, times=FAST)
        self.server = Server(self.gateway.service_names, is_public=True)
        await self.server.start(parse_address("127.0.0.1:0"))
        async with asyncio.timeout(20):
            await self.gateway.load(self.server)
        self.server.set_serving()
        self.channel = grpc.aio.insecure_channel(str(self.server.address))
        self.stub = GatewayServiceStub(self.channel)

    async def stop_gateway(self) -> None:
        gateway, self.gateway = self.gateway, None
        if gateway is not None:
            await self.channel.close()
            await self.server.stop(0.1)
            await gateway.close()

    async def kept(self, name: str) -> list[int]:
        """What the session holds, once no turn of it is live."""
        async with asyncio.timeout(30):
            while self.gateway is not None and self.gateway.sessions is not None:
                if not self.gateway.sessions.num_live:
                    break
                await asyncio.sleep(0.01)
        request = pb.GetSessionRequest(session_id=name, include_token_ids=True)
        return list((await self.stub.GetSession(request)).session.token_ids)

    async def turn(self, name: str) -> None:
        """One turn, perhaps left in the middle."""
        rng = self.rng
        new = [400 + rng.randrange(50) for _ in range(rng.randint(1, 30))]
        seed, count = rng.randrange(5), rng.randint(1, 25)
        leaves_after = rng.choice((None, None, None, 0, 3))
        prompt = self.histories[name] + new
        request = pb.GenerateRequest(
            session_id=name,
            token_ids=pb.TokenIds(ids=new),
            sampling=gen.SamplingParams(seed=seed, max_tokens=count),
        )
        got: list[int] = []
        is_left = False
        call = self.stub.Generate(request, timeout=60)
        while (response := await call.read()) is not grpc.aio.EOF:
            got += response.delta.token_ids
            if response.HasField("finish"):
                self.num_cached += response.finish.usage.cached_tokens
            if leaves_after is not None and len(got) >= leaves_after:
                is_left = call.cancel()
                break
        expected = expected_tokens(prompt, seed, 0, count)
        kept = await self.kept(name)
        if is_left:
            self.num_cut += 1
            output = kept[len(prompt) :]
            assert len(output) >= len(got)
            assert kept == (prompt + expected[: len(output)] if output else self.histories[name])
        else:
            assert got == expected
            assert kept == prompt + expected
            self.num_kept += 1
        self.histories[name] = kept

    async def noise(self) -> None:
        """Somebody else, who needs blocks."""
        ids = [self.rng.randrange(300, 3000) for _ in range(300)]
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=ids), sampling=gen.SamplingParams(max_tokens=3)
        )
        async for _ in self.stub.Generate(request, timeout=60):
            pass

    async def fault(self) -> None:
        """In the middle of the turns: one engine goes, the other stays, or it comes back."""
        await asyncio.sleep(self.rng.random() * 0.05)
        down = [index for index in range(2) if not self.is_up[index]]
        if down:
            await self.start_engine(down[0])
        elif self.rng.random() < 0.6:
            await self.kill_engine(self.rng.randrange(2))
            self.num_kills += 1

    async def round(self) -> None:
        names = list(self.histories)
        await asyncio.gather(
            *(self.one(name) for name in names), self.fault(), *(self.noise() for _ in range(2))
        )
        if self.rng.random() < 0.25:
            await self.stop_gateway()
            await self.start_gateway()
            self.num_restarts += 1
            for name in names:
                assert await self.kept(name) == self.histories[name]

    async def one(self, name: str) -> None:
        if len(self.histories[name]) > MAX_MODEL_LEN - 60:
            await self.stub.DeleteSession(pb.DeleteSessionRequest(session_id=name))
            await self.create(name)
        await self.turn(name)

    async def create(self, name: str) -> None:
        await self.stub.CreateSession(pb.CreateSessionRequest(session_id=name))
        self.histories[name] = []


async def play(seed: int, num_rounds: int, path: Any) -> World:
    async with AsyncExitStack() as stack:
        world = World(random.Random(seed), stack, path)
        await world.start()
        for number in range(NUM_SESSIONS):
            await world.create(f"s{number}")
        for _ in range(num_rounds):
            await world.round()
        for index in range(2):
            if world.is_up[index]:
                await quiet(world.engines[index])
    return world


async def quiet(engine: MockEngine) -> None:
    """Wait until nothing is live, then recount its blocks."""
    async with asyncio.timeout(30):
        while engine.core.num_live:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    counts = engine.core.blocks.counts()
    assert counts.active == 0
    assert counts.free + counts.cached == 40


@pytest.mark.parametrize("seed", range(2))
async def test_each_turn_equals_a_stateless_run(seed, tmp_path):
    world = await play(seed, 8, tmp_path / "sessions.db")
    assert world.num_kept > 5
    assert world.num_cached > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
async def test_each_turn_equals_a_stateless_run_for_long(seed, tmp_path):
    world = await play(seed, 60, tmp_path / "sessions.db")
    print({name: value for name, value in vars(world).items() if name.startswith("num_")})
    assert world.num_kept > 50
    assert world.num_cut > 5
