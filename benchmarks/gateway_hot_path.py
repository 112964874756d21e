"""What a token costs in the gateway's own code: `python -m benchmarks.gateway_hot_path [--streams N]`.

Frames go in at the multiplexer and come out of the servicer's Generate as bytes; the network is left out, on
both sides. The figure is CPU time of the thread, per token, so it hardly depends on what else the machine
does. `measure` is also what the test of the speed runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from benchmarks.gateway_processes import ROOT
from services.gateway.links.multiplexer import LinkCounters, Multiplexer
from services.gateway.request import ResolvedRequest
from services.gateway.servicer import GatewayServicer
from services.gateway.streams.live import LiveRequest
from services.gateway.streams.pacing import Pacer
from services.gateway.text.detokenizer import Vocabulary
from services.gateway.text.tokenization import Tokenizer
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as gateway_pb
from weft.v1 import generation_pb2 as pb

_FIRST_ID, _NUM_IDS = 300, 3000


class _Assets:
    """The part of a model's assets that output needs."""

    def __init__(self) -> None:
        self.vocabulary = Vocabulary(Tokenizer((ROOT / "models/demo/tokenizer.json").read_bytes()))


class _Gateway:
    """Gives out readers of requests that are made beforehand."""

    def __init__(self, requests: list[LiveRequest]) -> None:
        self._requests = requests

    @asynccontextmanager
    async def open(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        yield self._requests.pop().attach()


class _Context:
    """A call whose writes are done at once; what is written is kept as bytes when asked for."""

    def __init__(self, kept: list[bytes] | None) -> None:
        self.num_messages = 0
        self._kept = kept

    def time_remaining(self) -> float | None:
        """No deadline."""
        return None

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Once a call: no part of a token's way."""

    async def write(self, message: Any) -> None:
        """What the library would do first."""
        data = message if isinstance(message, bytes) else message.SerializeToString()
        self.num_messages += 1
        if self._kept is not None:
            self._kept.append(data)


def resolved_request(assets: Any, number: int, stops: tuple[str, ...]) -> ResolvedRequest:
    """One request with everything set."""
    return ResolvedRequest(
        request_id=f"r{number}",
        info=engine_pb.GetInfoResponse(model_name="demo"),
        assets=assets,
        prompt_token_ids=[1, 2, 3],
        sampling=pb.SamplingParams(max_tokens=100_000, seed=1),
        num_samples=1,
        stops=stops,
        terminal_ids=frozenset((1,)),
        skip_special_tokens=True,
        priority=0,
        must_complete=False,
        cache_salt="",
        deadline=None,
    )


def _frame(slots: list[int], step: int, steps_per_frame: int) -> bytes:
    frame = engine_pb.StepFrame(epoch=1, step=step)
    for position in range(step * steps_per_frame, (step + 1) * steps_per_frame):
        frame.slots.extend(slots)
        frame.positions.extend([position] * len(slots))
        frame.token_ids.extend(_FIRST_ID + (slot * 7919 + position * 31) % _NUM_IDS for slot in slots)
    return engine_pb.ConnectResponse(frame=frame).SerializeToString()


async def measure(
    *,
    num_streams: int = 256,
    num_frames: int = 40,
    steps_per_frame: int = 1,
    stops: tuple[str, ...] = (),
    kept: list[list[bytes]] | None = None,
) -> dict[str, float]:
    """CPU time per token and per message, in microseconds. `kept` gets the messages of each stream."""
    assets = _Assets()
    loop = asyncio.get_running_loop()
    counters = LinkCounters()
    owner: Any = None
    multiplexer = Multiplexer(
        1,
        owner=owner,
        send=lambda command: None,
        now=loop.time,
        counters=counters,
        credit_bytes=1 << 40,
    )
    pacer = Pacer(0.0)
    requests = [
        LiveRequest(replace(resolved_request(assets, number, stops)), loop.time, pacer=pacer)
        for number in range(num_streams)
    ]
    samples = [request.samples[0] for request in requests]
    for sample in samples:
        multiplexer.submit(sample)
        sample.on_accepted()
    slots = [sample.slot for sample in samples]
    keeping = [[] for _ in samples] if kept is not None else [None] * num_streams
    contexts = [_Context(messages) for messages in keeping]
    gateway: Any = _Gateway(requests[::-1])
    servicer = GatewayServicer(gateway)
    request = gateway_pb.GenerateRequest()
    tasks = [asyncio.create_task(servicer.Generate(request, context)) for context in contexts]
    frames = [_frame(slots, step, steps_per_frame) for step in range(num_frames)]
    await asyncio.sleep(0)
    gc.collect()
    num_warm = num_frames // 4
    begun = 0.0
    for number, data in enumerate(frames):
        if number == num_warm:
            begun = time.thread_time()
            before = sum(context.num_messages for context in contexts)
        multiplexer.on_frame(engine_pb.ConnectResponse.FromString(data).frame)
        for _ in range(3):  # until the woken tasks have run
            await asyncio.sleep(0)
    cpu_s = time.thread_time() - begun
    num_messages = sum(context.num_messages for context in contexts) - before
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if kept is not None:
        kept[:] = [messages for messages in keeping if messages is not None]
    num_tokens = num_streams * steps_per_frame * (num_frames - num_warm)
    return {
        "tokens": num_tokens,
        "messages": num_messages,
        "us_per_token": 1e6 * cpu_s / num_tokens,
        "us_per_message": 1e6 * cpu_s / num_messages,
    }


def main(argv: list[str]) -> int:
    """Measure the usual cases and print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway_hot_path", description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--frames", type=int, default=200)
    arguments = parser.parse_args(argv)
    for name, steps_per_frame, stops in (
        ("one token a frame", 1, ()),
        ("four tokens a frame", 4, ()),
        ("one token a frame, with a stop string", 1, ("\n\nUser:",)),
    ):
        sizes = {"num_streams": arguments.streams, "num_frames": arguments.frames}
        runs = [asyncio.run(measure(**sizes, steps_per_frame=steps_per_frame, stops=stops)) for _ in range(3)]
        best = min(runs, key=lambda run: run["us_per_token"])
        print(f"{name:40} {best['us_per_token']:6.2f} us a token, {best['us_per_message']:6.2f} us a message")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
