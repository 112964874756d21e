"""A real engine behind a real server, with an oracle in place of a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from services.engine.core.admission import CoreLimits
from services.engine.core.block_manager import BlockManager
from services.engine.core.engine_core import EngineCore
from services.engine.core.scheduler import Scheduler, SchedulerConfig
from services.engine.loop import EngineLoop
from services.engine.rpc.errors import engine_failed
from services.engine.rpc.servicer import SERVICE_NAME, EngineServicer
from tests.services.engine.core.oracle import VOCABULARY, OracleRunner, next_token
from weft.rpc.address import Address
from weft.rpc.server import Server
from weft.v1 import engine_service_pb2 as pb
from weft.v1 import generation_pb2
from weft.v1.engine_service_pb2_grpc import EngineServiceStub, add_EngineServiceServicer_to_server

MAX_MODEL_LEN = 2_000
PLENTY = 1 << 40
CODES = {code.value[0]: code for code in grpc.StatusCode}


class SlowRunner(OracleRunner):
    """The oracle, a little slower: `step_s` per forward, so that things can happen between steps."""

    step_s = 0.001

    def forward(self, chunks: Any) -> Any:
        time.sleep(self.step_s)
        return super().forward(chunks)

    def sample(self, logits: Any, chunks: Any) -> Any:
        rows = super().sample(logits, chunks)
        return [
            row
            if isinstance(row, Exception) or chunk.sequence.params.logprobs is None
            else row._replace(
                logprob=-0.5, top_logprobs=tuple((i, -1.0 - i) for i in range(chunk.sequence.params.logprobs))
            )
            for row, chunk in zip(rows, chunks, strict=True)
        ]


class Engine:
    """What a test may reach into."""

    def __init__(self, *, num_blocks: int = 512, max_queue_size: int = 64, max_batch_size: int = 64) -> None:
        self.runner = SlowRunner(num_blocks, 16)
        self.blocks = BlockManager(num_blocks, 16)
        limits = CoreLimits(VOCABULARY, MAX_MODEL_LEN, max_queue_size)
        scheduler = Scheduler(SchedulerConfig(max_batch_size=max_batch_size), self.blocks)
        self.core = EngineCore(self.runner, scheduler, self.blocks, limits)
        self.events = asyncio.get_running_loop()
        self.loop = EngineLoop(self.core, on_fault=self._on_fault)
        self.info = pb.GetInfoResponse(
            model_name="oracle",
            vocab_size=VOCABULARY,
            max_model_len=MAX_MODEL_LEN,
            block_size=16,
            num_blocks=num_blocks,
            numerics_id="oracle",
            max_queue_size=max_queue_size,
            max_batch_size=max_batch_size,
        )
        self.servicer = EngineServicer(self.loop, self.info)
        self.faults: list[BaseException] = []
        self.server = Server((SERVICE_NAME,))
        self.stub: Any = None
        self.channel: Any = None

    def _on_fault(self, error: BaseException) -> None:
        self.faults.append(error)
        self.events.call_soon_threadsafe(self.servicer.fail_all, engine_failed())

    def check_idle(self) -> None:
        """Nothing is live and no block is owned."""
        self.core.check_integrity()
        counts = self.blocks.counts()
        assert counts.active == 0
        assert self.core.num_live == 0
        assert self.servicer.num_live == 0
        assert self.servicer._door.num_unanswered == 0
        counters = self.core.report().counters
        assert counters.begun == counters.ended


@asynccontextmanager
async def running_engine(**settings: Any) -> AsyncIterator[Engine]:
    """An engine that serves on a loopback port; checked for leaks at the end."""
    engine = Engine(**settings)
    engine.loop.start()
    add_EngineServiceServicer_to_server(engine.servicer, engine.server.grpc)
    await engine.server.start(Address("127.0.0.1", 0))
    engine.server.set_serving()
    async with grpc.aio.insecure_channel(str(engine.server.address)) as channel:
        engine.channel, engine.stub = channel, EngineServiceStub(channel)
        try:
            yield engine
            if not engine.faults:
                await eventually(lambda: not engine.core.num_live and not engine.servicer.num_live)
                engine.check_idle()
            counters = engine.server.counters
            await eventually(lambda: counters.begun - counters.ended == 0)
        finally:
            await engine.server.stop(0)
            engine.loop.stop()


async def ends_with(call) -> grpc.aio.AioRpcError:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")


async def eventually(is_true: Any, within_s: float = 5.0) -> None:
    """Wait until a condition holds; fail when it does not in time."""
    for _ in range(int(within_s / 0.01)):
        if is_true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true in time")


def expected(
    prompt: list[int], num_tokens: int, *, seed: int = 1, sample_index: int = 0, emitted: Any = ()
) -> list[int]:
    """What the oracle draws after a prompt, from the end of `emitted` on."""
    output = list(emitted)
    while len(output) < num_tokens:
        output.append(next_token(prompt + output, seed, sample_index))
    return output[len(emitted) :]


def sampling(max_tokens: int = 5, *, seed: int = 1, **fields: Any) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **fields)


def submit(
    slot: int, prompt: list[int], max_tokens: int = 5, *, seed: int = 1, **fields: Any
) -> pb.ConnectRequest:
    params = fields.pop("sampling", None) or sampling(max_tokens, seed=seed)
    message = pb.Submit(slot=slot, prompt_token_ids=prompt, sampling=params, **fields)
    return pb.ConnectRequest(submit=message)


class Gateway:
    """The other end of a link: what it got, by slot, checked for epoch and position on arrival."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.epoch = 0
        self.hello: Any = None
        self.accepted: list[int] = []
        self.rejected: dict[int, Any] = {}
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.first_position: dict[int, int] = {}
        self.finished: dict[int, Any] = {}
        self.heartbeats: list[Any] = []
        self.draining: list[Any] = []
        self.frames: list[Any] = []

    async def send(self, **command: Any) -> None:
        await self.call.write(pb.ConnectRequest(**command))

    async def read(self) -> Any:
        """Take one message in; None at the end of the stream."""
        response = await self.call.read()
        if response is grpc.aio.EOF:
            return None
        kind = response.WhichOneof("event")
        message = getattr(response, kind)
        if kind == "hello":
            self.hello, self.epoch = message, message.epoch
            return kind
        assert message.epoch == self.epoch
        if kind == "accepted":
            self.accepted.append(message.slot)
        elif kind == "rejected":
            self.rejected[message.slot] = message.failure
        elif kind == "heartbeat":
            self.heartbeats.append(message)
        elif kind == "draining":
            self.draining.append(message)
        else:
            self._take_frame(message)
        return kind

    def _take_frame(self, frame: Any) -> None:
        self.frames.append(frame)
        assert len(frame.slots) == len(frame.token_ids) == len(frame.positions)
        for entry, (slot, token_id, position) in enumerate(
            zip(frame.slots, frame.token_ids, frame.positions, strict=True)
        ):
            assert slot not in self.finished, "a token after the end"
            first = self.first_position.setdefault(slot, position)
            tokens = self.tokens.setdefault(slot, [])
            assert position == first + len(tokens), "a hole or a repeat"
            tokens.append(token_id)
            found = [entry_logprobs for entry_logprobs in frame.logprobs if entry_logprobs.entry == entry]
            self.logprobs.setdefault(slot, []).append(found[0] if found else None)
        for end in frame.finished:
            assert end.slot not in self.finished, "two ends"
            self.finished[end.slot] = end

    async def read_until(self, is_done: Any, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not is_done():
                assert await self.read() is not None, "the stream ended"


@asynccontextmanager
async def linked(engine: Engine, *, credit: int = PLENTY, metadata: Any = None) -> AsyncIterator[Gateway]:
    """An open link, hello exchanged."""
    call = engine.stub.Connect(metadata=metadata)
    gateway = Gateway(call)
    try:
        await gateway.send(
            hello=pb.GatewayHello(protocol_version=1, gateway_id="test", initial_credit_bytes=credit)
        )
        assert await gateway.read() == "hello"
        yield gateway
    finally:
        call.cancel()
