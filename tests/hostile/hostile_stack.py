"""A gateway and an engine in this process, with bystanders that check every token they get.

The engine is the mock: real scheduler, blocks and gRPC, tokens that are a keyed hash of the whole history.
Whatever a hostile client does, the bystanders' tokens must stay what the oracle says, the probe must be
answered, and as much must end as began. Knows no hostile input.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from services.gateway.application import GatewayApplication
from services.gateway.config import GatewayConfig
from tools.mock_engine import MockEngine
from tools.mock_engine.oracle import expected_tokens
from weft.rpc.address import Address, parse_address
from weft.rpc.auth import Authenticator
from weft.rpc.server import Server
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.engine_service_pb2_grpc import EngineServiceStub
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
VOCABULARY = 4096
CONTEXT = 1024
BLOCK_SIZE = 16
NUM_BLOCKS = 512
BYSTANDER_TOKENS = 600
# CPU time for which one thing may hold the event loop, client and server together, collections of what other
# tests have left apart.
MAX_HOLD_S = 0.35
# How long what comes soon may take on a machine that does much else.
SOON_S = 60.0
PROBE = [301, 302, 303]
CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_numbers = itertools.count()


def token_request(prompt: list[int], num_tokens: int, seed: int, **fields: Any) -> pb.GenerateRequest:
    sampling = gen.SamplingParams(max_tokens=num_tokens, seed=seed, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, **fields)


class Bystander:
    """One stream after the other, each token compared with the oracle's. `wrong` says what was amiss."""

    def __init__(self, stack: Stack, kind: str) -> None:
        self.kind = kind
        self.wrong: list[str] = []
        self.num_tokens = 0
        self.num_streams = 0
        self.is_stopping = False
        self._stack = stack
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self.is_stopping:
            number = next(_numbers)
            prompt = [300 + number % 3000, 777, 300 + number * 7 % 3000]
            wanted = expected_tokens(prompt, number, 0, BYSTANDER_TOKENS)
            found: list[int] = []
            try:
                async with asyncio.timeout(4 * SOON_S):
                    await getattr(self, f"_{self.kind}")(prompt, number, found)
            except Exception as error:
                self.wrong.append(f"{self.kind} {number}: {error!r}")
                return
            if found != wanted:
                self.wrong.append(f"{self.kind} {number}: other tokens, {len(found)} of {len(wanted)}")
            self.num_streams += 1

    def _take(self, found: list[int], token_ids: Any) -> None:
        found.extend(token_ids)
        self.num_tokens += len(token_ids)

    async def _generate(self, prompt: list[int], seed: int, found: list[int]) -> None:
        async for response in self._stack.stub.Generate(token_request(prompt, BYSTANDER_TOKENS, seed)):
            self._take(found, response.delta.token_ids)

    async def _multiplex(self, prompt: list[int], seed: int, found: list[int]) -> None:
        call = self._stack.stub.Multiplex()
        try:
            request = token_request(prompt, BYSTANDER_TOKENS, seed)
            await call.write(pb.MultiplexRequest(stream_id=1, generate=request))
            await call.done_writing()
            async for message in call:
                if message.HasField("end") and message.end.HasField("failure"):
                    raise RuntimeError(message.end.failure.message)
                self._take(found, message.response.delta.token_ids)
        finally:
            call.cancel()

    async def _engine(self, prompt: list[int], seed: int, found: list[int]) -> None:
        sampling = gen.SamplingParams(max_tokens=BYSTANDER_TOKENS, seed=seed, ignore_eos=True)
        request = engine_pb.GenerateTokensRequest(prompt_token_ids=prompt, sampling=sampling)
        async for response in self._stack.engine_stub.GenerateTokens(request):
            self._take(found, response.token_ids)


@dataclass
class Stack:
    """What a test may reach into."""

    engine: MockEngine
    application: GatewayApplication
    server: Server
    channel: grpc.aio.Channel
    engine_channel: grpc.aio.Channel
    bystanders: list[Bystander] = field(default_factory=list)
    max_hold_s: float = 0.0
    # An open Connect call of the gateway, and what a test keeps open on purpose.
    num_links: int = 1

    def __post_init__(self) -> None:
        self.stub = GatewayServiceStub(self.channel)
        self.engine_stub = EngineServiceStub(self.engine_channel)

    @property
    def address(self) -> Address:
        return self.server.address

    @property
    def http(self) -> Address:
        assert self.application.http is not None
        return self.application.http.address

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    @property
    def report(self) -> Any:
        """The engine loop's newest snapshot."""
        loop = self.engine.application._loop
        assert loop is not None
        return loop.load()

    @property
    def engine_server(self) -> Server:
        assert self.engine.server is not None
        return self.engine.server

    def begin_bystanders(self, kinds: tuple[str, ...] = ("generate", "multiplex", "engine")) -> None:
        self.bystanders = [Bystander(self, kind) for kind in kinds]

    async def end_bystanders(self) -> None:
        for bystander in self.bystanders:
            bystander.is_stopping = True
        async with asyncio.timeout(2 * SOON_S):
            await asyncio.gather(*(bystander.task for bystander in self.bystanders))

    def check_bystanders(self) -> None:
        wrong = [text for bystander in self.bystanders for text in bystander.wrong]
        assert not wrong, wrong

    async def probe(self) -> None:
        """A request from a well-behaved client gets the oracle's tokens."""
        seed = next(_numbers) + 1_000_000
        found: list[int] = []
        async for response in self.stub.Generate(token_request(PROBE, 3, seed), timeout=SOON_S):
            found += response.delta.token_ids
        assert found == expected_tokens(PROBE, seed, 0, 3)

    def balance(self, allowed: int = 0) -> list[str]:
        """What has begun and not ended, beyond `allowed` at each place."""
        servicer = self.engine.application._servicer
        assert servicer is not None
        counts = {
            "gateway requests": self.application.gateway.num_live,
            "gateway waiting": self.application.gateway.admission.num_waiting,
            "gateway calls": self.server.counters.begun - self.server.counters.ended,
            "slots": sum(link.num_live for link in self.application.router.links),
            "engine calls": self.engine_server.counters.begun
            - self.engine_server.counters.ended
            - self.num_links,
            "engine sequences": self.report.counters.begun - self.report.counters.ended,
            "unanswered": servicer._door.num_unanswered,
        }
        return [f"{name}: {count}" for name, count in counts.items() if count > allowed]

    async def settled(self, within_s: float = SOON_S) -> None:
        """Nothing but the bystanders is left."""
        allowed = len(self.bystanders)
        await eventually(lambda: not self.balance(allowed), lambda: self.balance(allowed), within_s)

    async def idle(self) -> None:
        """Nothing at all is left, and no block is owned."""
        await eventually(lambda: not self.balance(), self.balance, SOON_S)
        await eventually(lambda: self.report.blocks.active == 0, lambda: self.report.blocks, SOON_S)
        self.engine.core.check_integrity()
        assert self.application.gateway.admission.num_live == 0
        assert self.application.gateway.admission.waiting_tokens == 0
        self.check_codes()

    def check_codes(self) -> None:
        """No call, and no request on one, has ended with what only a bug ends with."""
        gateway = self.application.gateway
        for counters in (self.server.counters, self.engine_server.counters, gateway.counters):
            for code in ("UNKNOWN", "INTERNAL"):
                assert not counters.by_code[code], counters.by_code

    @asynccontextmanager
    async def watched(self, max_hold_s: float | None = MAX_HOLD_S) -> AsyncIterator[None]:
        """Around a hostile act: afterwards the bystanders are unharmed, the probe is answered, everything
        that began has ended, and the event loop was held for at most `max_hold_s` of CPU time at once.
        """
        self.max_hold_s = 0.0
        before = [bystander.num_tokens for bystander in self.bystanders]
        watch = asyncio.create_task(self._watch_holds())
        try:
            yield
        finally:
            watch.cancel()
        worst = self.max_hold_s
        await self.probe()
        await self.settled()
        self.check_bystanders()
        self.check_codes()
        for bystander, count in zip(self.bystanders, before, strict=True):
            await eventually(
                lambda b=bystander, c=count: b.num_tokens > c or b.wrong, lambda b=bystander: b.kind, SOON_S
            )
        assert max_hold_s is None or worst <= max_hold_s, f"the event loop was held for {worst:.2f} s"

    async def _watch_holds(self) -> None:
        collecting = 0.0
        thread = threading.get_ident()

        def on_collection(phase: str, info: dict[str, int]) -> None:
            nonlocal collecting
            if threading.get_ident() == thread:
                collecting += time.thread_time() * (1 if phase == "stop" else -1)

        gc.callbacks.append(on_collection)
        try:
            used = time.thread_time()
            while True:
                await asyncio.sleep(0.001)
                now = time.thread_time() - collecting
                self.max_hold_s, used = max(self.max_hold_s, now - used), now
        finally:
            gc.callbacks.remove(on_collection)


async def eventually(holds: Callable[[], Any], what: Callable[[], Any], within_s: float = SOON_S) -> None:
    """Wait until `holds`; fail with `what` it was instead."""
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, what()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def running_stack(
    *, authenticator: Authenticator | None = None, engine: dict[str, Any] | None = None, **flags: Any
) -> AsyncIterator[Stack]:
    """A mock engine, a gateway with both faces in front of it, and nobody on it yet."""
    async with contextlib.AsyncExitStack() as stack:
        knobs = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "max_model_len": CONTEXT, "step_ms": 3.0}
        mock = await stack.enter_async_context(MockEngine(**{**knobs, **(engine or {})}))
        flags.setdefault("drain_seconds", 2.0)
        config = GatewayConfig(
            engine=(str(mock.address),), tokenizer=DEMO, http=parse_address("127.0.0.1:0"), **flags
        )
        application = GatewayApplication(config, authenticator=authenticator)
        server = Server(application.service_names, is_public=True, authenticator=authenticator)
        await server.start(parse_address("127.0.0.1:0"))
        stack.push_async_callback(application.close)
        stack.push_async_callback(server.stop, 0.2)
        async with asyncio.timeout(SOON_S):
            await application.load(server)
        server.set_serving()
        options = [("grpc.max_send_message_length", 256 << 20), ("grpc.use_local_subchannel_pool", 1)]
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(str(server.address), options=options)
        )
        engine_channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(str(mock.address), options=options)
        )
        yield Stack(mock, application, server, channel, engine_channel)
