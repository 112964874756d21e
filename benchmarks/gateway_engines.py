"""Engines for measuring a gateway: `python -m benchmarks.gateway_engines clock|quiet [FLAGS]`.

`clock` is the mock engine, flags and all, whose tokens tell when they were drawn: the clock in units of
`TICK_S`, modulo the vocabulary. `quiet` speaks the link alone: it answers each request with one token and
then says nothing but heartbeats, for streams that are open and idle. Neither checks anything.
"""

# ruff: noqa: N802 - the names are the wire's

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceABC
from typing import Any

import grpc

from services.engine.core.batch import Chunk, SampledToken
from tools.mock_engine import oracle
from tools.mock_engine.config import DEMO_MODEL, load
from tools.mock_engine.engine import make_application
from tools.mock_engine.runner import HashRunner
from weft import logs
from weft.artifact.manifest import tokenizer_digest
from weft.rpc.address import parse_address
from weft.rpc.options import server_options
from weft.rpc.server import exit_process, serve
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb
from weft.v1.engine_service_pb2_grpc import EngineServiceServicer, add_EngineServiceServicer_to_server

TICK_S = 50e-6
BEAT_S = 0.2
log = logs.get_logger("bench_engine")


def clock_token(now_s: float) -> int:
    """The token of a moment of the monotonic clock, which all processes of a machine share."""
    return oracle.FIRST_TOKEN_ID + int(now_s / TICK_S) % oracle.NUM_TOKEN_IDS


def age_s(token_id: int, now_s: float) -> float:
    """How long ago a clock token was drawn, if that is less than `TICK_S` times the vocabulary (150 ms)."""
    ticks = int(now_s / TICK_S) - (token_id - oracle.FIRST_TOKEN_ID)
    return (ticks % oracle.NUM_TOKEN_IDS) * TICK_S


class ClockRunner(HashRunner):
    """Draws the clock, once per step, and reads no history."""

    def forward(self, chunks: SequenceABC[Chunk]) -> list[bytes]:
        """Take as long as a step takes."""
        if self.step_s > 0:
            time.sleep(self.step_s)
        return [b""] * sum(chunk.is_sampling for chunk in chunks)

    def sample(
        self, logits: SequenceABC[bytes], chunks: SequenceABC[Chunk]
    ) -> list[SampledToken | Exception]:
        """One token for all."""
        token = SampledToken(clock_token(time.monotonic()))
        return [token] * len(logits)


class QuietEngine(EngineServiceServicer):
    """One token for each request, then nothing until it is cancelled."""

    def __init__(self) -> None:
        self._epochs = itertools.count(int(time.time()))
        self._info = engine_pb.GetInfoResponse(
            model_name="demo",
            artifact_version="v1",
            artifact_digest="sha256:quiet",
            tokenizer_digest=tokenizer_digest(DEMO_MODEL),
            vocab_size=4096,
            max_model_len=1024,
            eos_token_ids=[1],
            block_size=16,
            num_blocks=1 << 20,
            max_batch_size=1 << 16,
            max_queue_size=1 << 16,
            is_deterministic=True,
            numerics_id="quiet",
        )

    async def Connect(self, requests: AsyncIterator[engine_pb.ConnectRequest], context: Any) -> None:
        """The link. Credit is not counted: what is sent is far below it."""
        epoch = next(self._epochs)
        await context.read()
        hello = engine_pb.EngineHello(protocol_version=1, epoch=epoch, info=self._info)
        await context.write(engine_pb.ConnectResponse(hello=hello))
        outbox: asyncio.Queue[engine_pb.ConnectResponse] = asyncio.Queue()
        tasks = [
            asyncio.create_task(work) for work in (self._beat(epoch, outbox), self._write(outbox, context))
        ]
        try:
            async for request in requests:
                self._answer(request, epoch, outbox)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _beat(epoch: int, outbox: asyncio.Queue[engine_pb.ConnectResponse]) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            beat = engine_pb.Heartbeat(epoch=epoch, step=1, step_bound_ms=60_000)
            outbox.put_nowait(engine_pb.ConnectResponse(heartbeat=beat))

    @staticmethod
    async def _write(outbox: asyncio.Queue[engine_pb.ConnectResponse], context: Any) -> None:
        while True:
            await context.write(await outbox.get())

    @staticmethod
    def _answer(
        request: engine_pb.ConnectRequest, epoch: int, outbox: asyncio.Queue[engine_pb.ConnectResponse]
    ) -> None:
        frame = engine_pb.StepFrame(epoch=epoch, step=1)
        kind = request.WhichOneof("command")
        if kind == "submit":
            slot = request.submit.slot
            outbox.put_nowait(engine_pb.ConnectResponse(accepted=engine_pb.Accepted(epoch=epoch, slot=slot)))
            frame.slots.append(slot)
            frame.token_ids.append(oracle.FIRST_TOKEN_ID)
            frame.positions.append(0)
        elif kind == "cancel":
            usage = pb.Usage(prompt_tokens=1, completion_tokens=1)
            frame.finished.add(slot=request.cancel.slot, reason=pb.FINISH_REASON_CANCELLED, usage=usage)
        else:
            return
        outbox.put_nowait(engine_pb.ConnectResponse(frame=frame))


async def _serve_quiet() -> None:
    server = grpc.aio.server(options=server_options(is_public=False))
    add_EngineServiceServicer_to_server(QuietEngine(), server)
    address = parse_address("127.0.0.1:0")
    port = server.add_insecure_port(str(address))
    await server.start()
    log.info("listening", address=str(address._replace(port=port)))
    log.info("serving", address=str(address._replace(port=port)))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(0)


async def _serve_clock(flags: SequenceABC[str]) -> int:
    config = load(flags)
    runner = ClockRunner(config.num_blocks, config.block_size, step_s=config.step_ms / 1e3)
    return await serve(make_application(config, runner), config.listen)


def main(argv: list[str]) -> int:
    """Serve until SIGTERM."""
    logs.start("info")
    if argv[:1] == ["quiet"]:
        asyncio.run(_serve_quiet())
        return 0
    if argv[:1] == ["clock"]:
        return asyncio.run(_serve_clock(argv[1:]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
