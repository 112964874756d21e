"""The client process of the gateway's benchmark: `python -m benchmarks.gateway_client WHAT ARGUMENTS...`.

Each measurement prints one line of JSON. The gateway's CPU time and memory are read from /proc by its pid.
Answers are kept as bytes while the clock runs and read afterwards, so that the client's own work is small.

    throughput GATEWAY PID STREAMS SECONDS     tokens per CPU second of the gateway
    latency TARGET direct|gateway STREAMS TOKENS   how old each clock token is when it arrives
    idle GATEWAY PID HTTP STREAMS              memory of open streams; then all are cancelled at once
    cancels GATEWAY PID REQUESTS               memory after every tenth of so many cancelled requests
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc

from benchmarks.gateway_engines import age_s
from benchmarks.gateway_processes import cpu_s, rss_bytes
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as gateway_pb
from weft.v1 import generation_pb2 as pb

STREAMS_PER_CHANNEL = 500
WARM_UP_S = 0.5
CANCELS_AT_ONCE = 100
SETTLE_S = 0.5
_EOF: Any = vars(grpc.aio)["EOF"]
_PROMPT_IDS = [300, 301, 302]
_METHODS = {"gateway": "/weft.v1.GatewayService/Generate", "direct": "/weft.v1.EngineService/GenerateTokens"}


def request(kind: str, max_tokens: int) -> bytes:
    """One request, as bytes."""
    sampling = pb.SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    if kind == "direct":
        message: Any = engine_pb.GenerateTokensRequest(prompt_token_ids=_PROMPT_IDS, sampling=sampling)
    else:
        message = gateway_pb.GenerateRequest(
            token_ids=gateway_pb.TokenIds(ids=_PROMPT_IDS), sampling=sampling
        )
    return message.SerializeToString()


def tokens_of(kind: str, data: bytes) -> list[int]:
    """The token ids of one answer."""
    if kind == "direct":
        return list(engine_pb.GenerateTokensResponse.FromString(data).token_ids)
    return list(gateway_pb.GenerateResponse.FromString(data).delta.token_ids)


class Calls:
    """Server streams over so many connections as they need."""

    def __init__(self, channels: list[grpc.aio.Channel], kind: str) -> None:
        self.kind = kind
        self._open = [
            channel.unary_stream(_METHODS[kind], request_serializer=None, response_deserializer=None)
            for channel in channels
        ]
        self._count = 0

    def start(self, max_tokens: int) -> Any:
        """Begin one more."""
        self._count += 1
        return self._open[self._count % len(self._open)](request(self.kind, max_tokens))


@asynccontextmanager
async def calls_to(target: str, kind: str, num_streams: int) -> AsyncIterator[Calls]:
    """Calls to one server, for at most so many at once."""
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
            )
            for _ in range(-(-num_streams // STREAMS_PER_CHANNEL))
        ]
        yield Calls(channels, kind)


async def throughput(target: str, pid: int, num_streams: int, seconds: float) -> dict[str, float]:
    """Tokens that arrive while the gateway uses so much CPU time; from when all streams have begun."""
    async with calls_to(target, "gateway", num_streams) as calls:
        answers: list[bytes] = []
        num_begun, all_begun = 0, asyncio.Event()

        async def read(call: Any) -> None:
            nonlocal num_begun
            await call.read()  # started
            answers.append(await call.read())
            num_begun += 1
            if num_begun == num_streams:
                all_begun.set()
            while (answer := await call.read()) is not _EOF:
                answers.append(answer)

        running = [calls.start(8_000) for _ in range(num_streams)]
        tasks = [asyncio.create_task(read(call)) for call in running]
        try:
            failing = asyncio.gather(*tasks)
            await asyncio.wait(
                [asyncio.ensure_future(all_begun.wait()), failing], return_when=asyncio.FIRST_COMPLETED
            )
            if failing.done():
                failing.result()
            await asyncio.sleep(WARM_UP_S)
            answers.clear()
            cpu, begun = cpu_s(pid), time.perf_counter()
            await asyncio.sleep(seconds)
            cpu, wall, window = cpu_s(pid) - cpu, time.perf_counter() - begun, answers[:]
        finally:
            for call in running:
                call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    num_tokens = sum(len(tokens_of("gateway", answer)) for answer in window)
    return {
        "tokens": num_tokens,
        "messages": len(window),
        "cpu_s": cpu,
        "wall_s": wall,
        "tokens_per_cpu_s": num_tokens / cpu,
        "messages_per_cpu_s": len(window) / cpu,
        "tokens_per_message": num_tokens / max(1, len(window)),
        "cpu_share": cpu / wall,
    }


async def latency(target: str, kind: str, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """Ages of the tokens at their arrival, in milliseconds, sorted. The first tokens of a stream, which come
    while others begin, are left out.
    """
    skip = num_tokens // 4
    async with calls_to(target, kind, num_streams) as calls:

        async def read(call: Any) -> list[tuple[float, bytes]]:
            arrived = []
            try:
                while (answer := await call.read()) is not _EOF:
                    arrived.append((time.monotonic(), answer))
            finally:
                call.cancel()
            return arrived

        gc.disable()
        streams = await asyncio.gather(*(read(calls.start(num_tokens)) for _ in range(num_streams)))
    ages = []
    for stream in streams:
        drawn = [(now, token_id) for now, answer in stream for token_id in tokens_of(kind, answer)]
        ages += [age_s(token_id, now) * 1e3 for now, token_id in drawn[skip : num_tokens - 1]]
    ages.sort()
    return {
        "tokens": len(ages),
        "p50_ms": ages[len(ages) // 2],
        "p99_ms": ages[len(ages) * 99 // 100],
    }


async def num_live(http: str) -> int:
    """Requests in flight, as the gateway's metrics tell."""
    host, _, port = http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode("latin-1")
    writer.close()
    lines = [line for line in text.splitlines() if line.startswith("weft_gateway_requests_live ")]
    return int(float(lines[0].split()[1]))


async def idle(target: str, pid: int, http: str, num_streams: int) -> dict[str, float]:
    """Open streams until each has its first token, let them lie, cancel all, wait until none is live."""
    before = rss_bytes(pid)
    async with calls_to(target, "gateway", num_streams) as calls:
        running: list[Any] = []

        async def begin() -> None:
            call = calls.start(1_000)
            running.append(call)
            for _ in range(2):  # started, and the token
                await call.read()

        begun = time.perf_counter()
        for first in range(0, num_streams, 500):
            await asyncio.gather(*(begin() for _ in range(first, min(first + 500, num_streams))))
        open_s = time.perf_counter() - begun
        await asyncio.sleep(SETTLE_S)
        open_bytes = rss_bytes(pid)
        cpu = cpu_s(pid)
        await asyncio.sleep(2.0)
        idle_share = (cpu_s(pid) - cpu) / 2.0
        cpu, begun = cpu_s(pid), time.perf_counter()
        for call in running:
            call.cancel()
        sent_s = time.perf_counter() - begun
        while await num_live(http) and time.perf_counter() - begun < 60:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        storm_s = time.perf_counter() - begun
        storm_cpu_s = cpu_s(pid) - cpu
    return {
        "streams": num_streams,
        "opens_per_s": num_streams / open_s,
        "before_mib": before / 2**20,
        "rss_mib": open_bytes / 2**20,
        "kib_per_stream": (open_bytes - before) / num_streams / 1024,
        "idle_cpu_share": idle_share,
        "storm_s": storm_s,
        "storm_sent_s": sent_s,
        "storm_cpu_s": storm_cpu_s,
    }


async def cancels(target: str, pid: int, num_requests: int) -> dict[str, Any]:
    """Requests that are cancelled after their first token. Memory is read when all of them are over."""
    async with calls_to(target, "gateway", CANCELS_AT_ONCE) as calls:

        async def one() -> None:
            call = calls.start(1_000)
            try:
                for _ in range(2):
                    await call.read()
            finally:
                call.cancel()

        async def some(count: int) -> int:
            for _ in range(count // CANCELS_AT_ONCE):
                await asyncio.gather(*(one() for _ in range(CANCELS_AT_ONCE)))
            await asyncio.sleep(SETTLE_S)
            gc.collect()
            return rss_bytes(pid)

        begun = time.perf_counter()
        step = num_requests // 10
        points = [await some(step)]  # the first tenth fills pools and caches
        points += [await some(step) for _ in range(9)]
        return {
            "requests": step * 10,
            "rss_bytes": points,
            "bytes_per_request": slope(points) / step,
            "requests_per_s": step * 10 / (time.perf_counter() - begun),
        }


def slope(points: list[int]) -> float:
    """Of equally spaced points, the first left out: the median over all pairs (Theil and Sen), which one
    point that is off does not change.
    """
    values = points[1:]
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median((later - sooner) / (j - i) for (i, sooner), (j, later) in pairs)


def main(argv: list[str]) -> int:
    """Run one measurement."""
    match argv:
        case ["throughput", target, pid, streams, seconds]:
            found: Any = throughput(target, int(pid), int(streams), float(seconds))
        case ["latency", target, ("direct" | "gateway") as kind, streams, tokens]:
            found = latency(target, kind, int(streams), int(tokens))
        case ["idle", target, pid, http, streams]:
            found = idle(target, int(pid), http, int(streams))
        case ["cancels", target, pid, requests]:
            found = cancels(target, int(pid), int(requests))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    print(json.dumps(asyncio.run(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
