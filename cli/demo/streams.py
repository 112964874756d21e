"""Sixteen clients at once, each with one completion, and what each of them saw and when."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import engine_service_pb2_grpc as engine_grpc
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import gateway_service_pb2_grpc as gateway_grpc
from weft.v1 import generation_pb2 as generation

MAX_TOKENS = 160
CALL_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 10.0
POLL_S = 0.2
FAULT_POLL_S = 0.02
SETTLE_S = 5.0

# The openings share their first sentences: the engine computes those once and finds them in its prefix cache.
OPENING = (
    "It was a cold and windy evening in the last week of November. The fire burned low in the great hall of "
    "the old house, and the rain beat against the windows. The company had drawn their chairs together, and "
    "no one had spoken for some time, when at last"
)
ENDINGS = (
    "the captain rose and",
    "the old lady said,",
    "there came a knock at the door, and",
    "the doctor took up the letter and",
    "a young man in a grey coat",
    "the king looked at his daughter and",
    "the dog began to bark, and",
    "my uncle, who had been asleep,",
    "the lawyer opened his bag and",
    "a voice from the stair cried,",
    "the clock struck twelve, and",
    "the stranger laid down his hat and",
)
QUESTIONS = (
    "Tell me, who lives in the house upon the hill?",
    "What did you see upon the road this morning?",
    "Why does the captain never speak of the sea?",
    "Where have they hidden the letter?",
)


@dataclass
class Stream:
    """One completion as its client sees it. Times are of time.monotonic(), in seconds."""

    title: str
    request: pb.GenerateRequest
    text: str = ""
    num_tokens: int = 0
    submitted_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    worst_gap_s: float = 0.0
    finish: pb.Finish | None = None
    error: str = ""

    @property
    def state(self) -> str:
        """One word for the view."""
        if self.error:
            return "failed"
        if self.finish is not None:
            return generation.FinishReason.Name(self.finish.reason).removeprefix("FINISH_REASON_").lower()
        return "waiting" if self.first_token_at is None else "running"

    def add(self, delta: pb.Delta, now: float) -> None:
        """Take in one delta. Tokens that came together share the gap before them."""
        self.text += delta.text
        count = len(delta.token_ids)
        if not count:
            return
        if self.first_token_at is None:
            self.first_token_at = now
        else:
            gap_s = now - self.last_token_at
            self.gaps_s.extend([gap_s / count] * count)
            self.worst_gap_s = max(self.worst_gap_s, gap_s)
        self.last_token_at = now
        self.num_tokens += count


def demo_streams() -> list[Stream]:
    """The sixteen requests: twelve stories that share an opening, four questions in the chat format."""
    streams = []
    for index, ending in enumerate(ENDINGS):
        request = pb.GenerateRequest(text=f"{OPENING} {ending}", request_id=f"demo-{index}")
        streams.append(Stream(ending, request))
    for index, question in enumerate(QUESTIONS, len(ENDINGS)):
        chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=question)])
        streams.append(Stream(question, pb.GenerateRequest(chat=chat, request_id=f"demo-{index}")))
    for seed, stream in enumerate(streams):
        stream.request.sampling.CopyFrom(
            generation.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, top_p=0.95, seed=seed)
        )
    return streams


class Load:
    """The newest GetLoad answers of the engines that live, added up; the peak is the largest."""

    def __init__(self) -> None:
        self.now = engine_pb.GetLoadResponse()
        self.running: list[int] = []
        """Sequences in the batch of each engine; 0 for one that does not answer."""

    async def ask(self, stubs: Sequence[engine_grpc.EngineServiceStub]) -> None:
        """Ask all; one that does not answer is left out."""
        total = engine_pb.GetLoadResponse()
        running = [0] * len(stubs)
        for index, stub in enumerate(stubs):
            try:
                load = await stub.GetLoad(engine_pb.GetLoadRequest(), timeout=LOAD_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                continue
            running[index] = load.running
            peak = max(total.peak_batch_size, load.peak_batch_size)
            for field_of, value in load.ListFields():
                if field_of.name not in ("peak_batch_size", "is_draining"):
                    setattr(total, field_of.name, getattr(total, field_of.name) + value)
            total.peak_batch_size = peak
        self.now, self.running = total, running

    async def poll(self, stubs: Sequence[engine_grpc.EngineServiceStub]) -> None:
        """Ask again and again until cancelled."""
        while True:
            await self.ask(stubs)
            await asyncio.sleep(POLL_S)


@dataclass
class Fault:
    """What is done, once all streams together have `after_tokens` tokens, to the engine with the most of
    them: `strike` is called with its index. Afterwards `at_s` is when it was, in seconds after the start, and
    `num_tokens` how many there were.
    """

    after_tokens: int
    strike: Callable[[int], None]
    at_s: float | None = None
    num_tokens: int = 0

    async def watch(self, streams: Sequence[Stream], load: Load, began: float) -> None:
        """Wait for the moment, and do it."""
        while True:
            self.num_tokens = sum(stream.num_tokens for stream in streams)
            if self.num_tokens >= self.after_tokens and any(load.running):
                break
            await asyncio.sleep(FAULT_POLL_S)
        self.at_s = time.monotonic() - began
        await asyncio.to_thread(self.strike, load.running.index(max(load.running)))


async def run_stream(stub: gateway_grpc.GatewayServiceStub, stream: Stream) -> None:
    """Run one request to its end; a failure is kept in the stream."""
    stream.submitted_at = time.monotonic()
    try:
        async for event in stub.Generate(stream.request, timeout=CALL_TIMEOUT_S):
            kind = event.WhichOneof("event")
            if kind == "delta":
                stream.add(event.delta, time.monotonic())
            elif kind == "finish":
                stream.finish = event.finish
    except grpc.aio.AioRpcError as error:
        stream.error = f"{error.code().name}: {error.details()}"
    else:
        if stream.finish is None:
            stream.error = "the stream ended without a finish"


async def run_streams(
    streams: Sequence[Stream],
    gateway: str,
    engines: Sequence[str],
    load: Load,
    fault: Fault | None = None,
) -> float:
    """Run all at once and return how long they took together, in seconds.

    At the end `load` holds the engines' state with nothing running, or the last one seen within SETTLE_S.
    """
    async with contextlib.AsyncExitStack() as channels:
        public, *internal = [
            await channels.enter_async_context(grpc.aio.insecure_channel(target))
            for target in (gateway, *engines)
        ]
        stub = gateway_grpc.GatewayServiceStub(public)
        engine_stubs = [engine_grpc.EngineServiceStub(channel) for channel in internal]
        began = time.monotonic()
        beside = [asyncio.create_task(load.poll(engine_stubs))]
        if fault is not None:
            beside.append(asyncio.create_task(fault.watch(streams, load, began)))
        try:
            await asyncio.gather(*(run_stream(stub, stream) for stream in streams))
            took = time.monotonic() - began
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        give_up_at = time.monotonic() + SETTLE_S
        while time.monotonic() < give_up_at:
            await load.ask(engine_stubs)
            if not load.now.active_blocks and load.now.requests_begun == load.now.requests_ended:
                break
            await asyncio.sleep(POLL_S)
        return took


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan
