"""An engine that follows the wire and computes nothing, and a gateway in this process in front of it.

Tokens are a known function of (seed, sample index, position), or a given text, so anything lost, doubled or
mixed up shows. Every test ends with the same check: as many requests ended as begun, and no slot left.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from services.gateway.application import GatewayApplication
from services.gateway.config import GatewayConfig
from services.gateway.gateway import RequestCounters
from services.gateway.links.terms import LinkTimes
from weft.limits import limits_of
from weft.rpc.address import Address, parse_address
from weft.rpc.auth import Authenticator
from weft.rpc.interceptor import RpcCounters
from weft.rpc.server import Server
from weft.rpc.tls import ServerTls
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb
from weft.v1.engine_service_pb2_grpc import EngineServiceServicer, add_EngineServiceServicer_to_server
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"
EOS = 1
EPOCHS = itertools.count(7)
FAST = LinkTimes(hello_s=2.0, dead_s=0.6, hung_s=0.3, tick_s=0.05, max_backoff_s=0.2, refused_backoff_s=0.2)


def oracle(seed: int, sample_index: int, position: int) -> int:
    """The token at one position of one sample: an ordinary one, never a special one."""
    digest = hashlib.blake2b(b"%d %d %d" % (seed, sample_index, position), digest_size=4).digest()
    return 300 + int.from_bytes(digest, "little") % 3000


@dataclass
class Slot:
    submit: engine_pb.Submit
    ids: list[int]
    until: float | None
    is_paused: bool = False
    is_cancelled: bool = False


class FakeEngine(EngineServiceServicer):
    """One engine. Its attributes are knobs; what it saw is in `submits`, `cancels`, `violations`."""

    def __init__(self) -> None:
        self.library = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        self.info = engine_pb.GetInfoResponse(
            model_name="demo",
            artifact_version="v1",
            artifact_digest="sha256:0",
            tokenizer_digest="sha256:" + hashlib.sha256((DEMO / "tokenizer.json").read_bytes()).hexdigest(),
            vocab_size=4096,
            max_model_len=1024,
            eos_token_ids=[EOS],
            block_size=128,
            num_blocks=64,
            is_deterministic=True,
            numerics_id="fake",
        )
        self.step_s = 0.002
        self.text: str | None = None
        self.text_ids: list[int] = []
        self.steps_per_frame = 1
        self.reject: pb.Failure | None = None
        self.error_at: dict[str, int] = {}
        self.is_hanging = False
        self.is_hung = False
        self.wrong_epoch = False
        self.announces_drain = False
        self.repeat_tokens = False
        self.skip_position: int | None = None
        self.answers_hello = True
        self.submits: list[engine_pb.Submit] = []
        self.cancels: list[int] = []
        self.pauses = 0
        self.resumes = 0
        self.credit = 0
        self.violations: list[str] = []
        self.slots: dict[int, Slot] = {}
        self.num_begun = 0
        self.num_ended = 0
        self.calls: set[asyncio.Task[Any]] = set()
        self.address = Address("127.0.0.1", 0)
        self._server: Any = None

    def say(self, text: str) -> None:
        """Answer every request with this text, then the end token."""
        self.text = text
        self.text_ids = self.library.encode(text, add_special_tokens=False).ids

    def token(self, slot: Slot) -> int:
        position = len(slot.ids)
        if self.text is not None:
            return self.text_ids[position] if position < len(self.text_ids) else EOS
        return oracle(slot.submit.sampling.seed, slot.submit.sample_index, position)

    async def start(self, address: Address | None = None) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_EngineServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(str(address or self.address))
        self.address = Address("127.0.0.1", port)
        await self._server.start()

    async def die(self) -> None:
        """Gone at once, as after kill -9."""
        for call in list(self.calls):
            call.cancel()
        await self._server.stop(0)
        self.slots.clear()

    async def Connect(self, requests: AsyncIterator[engine_pb.ConnectRequest], context: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.calls.add(task)
        reader = None
        try:
            first = await context.read()
            if first is grpc.aio.EOF or not self.answers_hello:
                await asyncio.sleep(30)
                return
            assert first.WhichOneof("command") == "hello"
            self.credit = first.hello.initial_credit_bytes
            epoch = next(EPOCHS)
            hello = engine_pb.EngineHello(protocol_version=1, epoch=epoch, info=self.info)
            await context.write(engine_pb.ConnectResponse(hello=hello))
            replies: asyncio.Queue[engine_pb.ConnectResponse] = asyncio.Queue()
            reader = asyncio.create_task(self._commands(context, epoch, replies))
            await self._steps(context, epoch, replies, reader)
        finally:
            self.calls.discard(task)
            if reader is not None:
                reader.cancel()
            self.num_ended += len(self.slots)
            self.slots.clear()

    async def _commands(self, context: Any, epoch: int, replies: Any) -> None:
        now = asyncio.get_running_loop().time
        while (message := await context.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("command")
            if kind == "submit":
                submit = message.submit
                self.submits.append(submit)
                if submit.slot in self.slots:
                    self.violations.append(f"slot {submit.slot} reused")
                if self.reject is not None:
                    rejected = engine_pb.Rejected(epoch=epoch, slot=submit.slot, failure=self.reject)
                    replies.put_nowait(engine_pb.ConnectResponse(rejected=rejected))
                    continue
                until = now() + submit.budget_ms / 1000 if submit.HasField("budget_ms") else None
                self.num_begun += 1
                self.slots[submit.slot] = Slot(submit, list(submit.emitted_token_ids), until)
                accepted = engine_pb.Accepted(epoch=epoch, slot=submit.slot)
                replies.put_nowait(engine_pb.ConnectResponse(accepted=accepted))
            elif kind == "cancel":
                self.cancels.append(message.cancel.slot)
                if message.cancel.slot in self.slots:
                    self.slots[message.cancel.slot].is_cancelled = True
            elif kind == "pause":
                self.pauses += 1
                if message.pause.slot in self.slots:
                    self.slots[message.pause.slot].is_paused = True
            elif kind == "resume":
                self.resumes += 1
                if message.resume.slot in self.slots:
                    self.slots[message.resume.slot].is_paused = False
            elif kind == "credit":
                self.credit += message.credit.bytes

    async def _steps(self, context: Any, epoch: int, replies: Any, reader: asyncio.Task[None]) -> None:
        step, beat_at = 0, 0.0
        loop = asyncio.get_running_loop()
        while not reader.done():
            await asyncio.sleep(self.step_s)
            if self.is_hanging:
                continue
            if self.announces_drain:
                self.announces_drain = False
                draining = engine_pb.Draining(epoch=epoch, deadline_ms=1000)
                await context.write(engine_pb.ConnectResponse(draining=draining))
            while not replies.empty():
                await context.write(replies.get_nowait())
            if self.slots and loop.time() - beat_at > 0.1:
                beat_at = loop.time()
                beat = engine_pb.Heartbeat(
                    epoch=epoch, step=step, step_elapsed_ms=5000 if self.is_hung else 0, step_bound_ms=100
                )
                await context.write(engine_pb.ConnectResponse(heartbeat=beat))
            if self.is_hung:
                continue
            frame = engine_pb.StepFrame(epoch=epoch + (1 if self.wrong_epoch else 0), step=step)
            for _ in range(self.steps_per_frame):
                step += 1
                for number, slot in list(self.slots.items()):
                    self._step(frame, number, slot, loop.time())
            if frame.slots or frame.finished:
                size = frame.ByteSize()
                if size > self.credit:
                    self.violations.append("no credit left")
                self.credit -= size
                await context.write(engine_pb.ConnectResponse(frame=frame))

    def _step(self, frame: engine_pb.StepFrame, number: int, slot: Slot, now: float) -> None:
        sampling = slot.submit.sampling
        if slot.is_cancelled:
            return self._finish(frame, number, slot, pb.FINISH_REASON_CANCELLED)
        if slot.until is not None and now > slot.until - 0.05:
            failure = None if slot.ids else pb.Failure(code=4, message="no token before the deadline")
            return self._finish(frame, number, slot, pb.FINISH_REASON_DEADLINE, failure)
        if slot.is_paused:
            return None
        if self.error_at.get(slot.submit.request_id) == len(slot.ids):
            failure = pb.Failure(code=13, message="internal error in sample", error_id="e1")
            return self._finish(frame, number, slot, pb.FINISH_REASON_ERROR, failure)
        token_id = self.token(slot)
        position = len(slot.ids)
        slot.ids.append(token_id)
        for _ in range(2 if self.repeat_tokens else 1):
            if self.skip_position != position:
                frame.slots.append(number)
                frame.token_ids.append(token_id)
                frame.positions.append(position)
                if sampling.HasField("logprobs"):
                    top = list(range(300, 300 + sampling.logprobs))
                    frame.logprobs.add(
                        entry=len(frame.slots) - 1,
                        logprob=-0.5,
                        top_token_ids=top,
                        top_logprobs=[-float(i) for i in range(len(top))],
                    )
        if self.skip_position == position:
            self.skip_position = None
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
        if token_id in ends and len(slot.ids) > sampling.min_tokens:
            return self._finish(frame, number, slot, pb.FINISH_REASON_STOP)
        if len(slot.ids) >= sampling.max_tokens:
            return self._finish(frame, number, slot, pb.FINISH_REASON_LENGTH)
        return None

    def _finish(
        self,
        frame: engine_pb.StepFrame,
        number: int,
        slot: Slot,
        reason: pb.FinishReason,
        failure: pb.Failure | None = None,
    ) -> None:
        del self.slots[number]
        self.num_ended += 1
        usage = pb.Usage(
            prompt_tokens=len(slot.submit.prompt_token_ids), completion_tokens=len(slot.ids), cached_tokens=3
        )
        receipt = pb.Receipt(queue_ms=1.5)
        frame.finished.add(slot=number, reason=reason, usage=usage, receipt=receipt, failure=failure)


@dataclass
class RunningGateway:
    """A gateway in this process: its parts, a stub, and the channel options of a plain client."""

    application: GatewayApplication
    server: Server
    stub: GatewayServiceStub
    channel: grpc.aio.Channel
    load: asyncio.Task[None]
    metadata: list[tuple[str, str]] = field(default_factory=list)

    @property
    def http_url(self) -> str:
        assert self.application.http is not None
        return f"http://{self.application.http.address}"

    @property
    def link(self) -> Any:
        return self.application.router.links[0]


StartEngine = Callable[..., Awaitable[FakeEngine]]
StartGateway = Callable[..., Awaitable[RunningGateway]]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def start_engine(stack: AsyncExitStack) -> StartEngine:
    async def start(**knobs: Any) -> FakeEngine:
        engine = FakeEngine()
        for name, value in knobs.items():
            assert hasattr(engine, name)
            setattr(engine, name, value)
        await engine.start()
        stack.push_async_callback(engine.die)
        return engine

    return start


@pytest.fixture
def start_gateway(stack: AsyncExitStack) -> StartGateway:
    async def start(
        *targets: Any,
        wait: bool = True,
        authenticator: Authenticator | None = None,
        tls: ServerTls | None = None,
        **options: Any,
    ) -> RunningGateway:
        options.setdefault("tokenizer", DEMO if "artifacts" not in options else None)
        options.setdefault("drain_seconds", 2.0)
        config = GatewayConfig(
            engine=tuple(str(getattr(target, "address", target)) for target in targets), **options
        )
        application = GatewayApplication(config, authenticator=authenticator, times=FAST, tls=tls)
        server = Server(
            application.service_names,
            is_public=True,
            authenticator=authenticator,
            tls=tls,
            limits=limits_of(config),
        )
        await server.start(parse_address("127.0.0.1:0"))
        stack.push_async_callback(application.close)
        stack.push_async_callback(server.stop, 0.2)
        load = asyncio.create_task(application.load(server))
        stack.callback(load.cancel)
        if wait:
            async with asyncio.timeout(60):
                await load
            server.set_serving()
        channel = grpc.aio.insecure_channel(
            str(server.address), options=[("grpc.max_send_message_length", 256 << 20)]
        )
        stack.push_async_callback(channel.close)
        return RunningGateway(application, server, GatewayServiceStub(channel), channel, load)

    return start


@pytest.fixture
async def engine(start_engine: StartEngine) -> FakeEngine:
    return await start_engine()


@pytest.fixture
async def gateway(start_gateway: StartGateway, engine: FakeEngine) -> RunningGateway:
    return await start_gateway(engine, http=parse_address("127.0.0.1:0"))


@pytest.fixture(autouse=True)
def balanced() -> Iterator[None]:
    """As many requests, and calls, ended as begun."""
    yield

    def open_ones() -> list[Any]:
        every = (*RequestCounters.instances, *RpcCounters.instances)
        return [counters for counters in every if counters.begun != counters.ended]

    if open_ones():
        gc.collect()  # what ends when it is collected; with all tests' objects around it takes a while
    for counters in open_ones():
        pytest.fail(str(vars(counters)))


@pytest.fixture
def settle() -> Callable[..., Awaitable[None]]:
    """Wait until something holds."""

    async def wait(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not holds():  # noqa: ASYNC110 - any condition can be waited for
                await asyncio.sleep(0.01)

    return wait
