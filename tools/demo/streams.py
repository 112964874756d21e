"""Sixteen clients at once, each with one completion, and what each of them saw and when."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import engine_service_pb2_grpc as engine_grpc
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import gateway_service_pb2_grpc as gateway_grpc
from weft.v1 import generation_pb2 as generation

MAX_TOKENS = 160
CALL_TIMEOUT_S = 120.0
POLL_S = 0.2
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
            self.gaps_s.extend([(now - self.last_token_at) / count] * count)
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
    """The newest GetLoad answer of the engine."""

    def __init__(self) -> None:
        self.now = engine_pb.GetLoadResponse()

    async def poll(self, stub: engine_grpc.EngineServiceStub) -> None:
        """Ask again and again until cancelled."""
        while True:
            self.now = await stub.GetLoad(engine_pb.GetLoadRequest(), timeout=CALL_TIMEOUT_S)
            await asyncio.sleep(POLL_S)


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


async def run_streams(streams: Sequence[Stream], gateway: str, engine: str, load: Load) -> float:
    """Run all at once and return how long they took together, in seconds.

    At the end `load` holds the engine's state with nothing running, or the last one seen within SETTLE_S.
    """
    async with grpc.aio.insecure_channel(gateway) as public, grpc.aio.insecure_channel(engine) as internal:
        stub, engine_stub = gateway_grpc.GatewayServiceStub(public), engine_grpc.EngineServiceStub(internal)
        poll = asyncio.create_task(load.poll(engine_stub))
        began = time.monotonic()
        await asyncio.gather(*(run_stream(stub, stream) for stream in streams))
        took = time.monotonic() - began
        poll.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await poll
        give_up_at = time.monotonic() + SETTLE_S
        while time.monotonic() < give_up_at:
            load.now = await engine_stub.GetLoad(engine_pb.GetLoadRequest(), timeout=CALL_TIMEOUT_S)
            if not load.now.active_blocks and load.now.requests_begun == load.now.requests_ended:
                break
            await asyncio.sleep(POLL_S)
        return took


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan
