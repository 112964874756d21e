"""A server that sends each token at a known time, and tells afterwards when it did: what `weft bench` reports
is held against that. Speaks the part of Weft's gRPC and of OpenAI's HTTP that the tool uses.

    python -m benchmarks.bench_server [--first-ms MS] [--gap-ms MS] [--per-message N]

prints one line of JSON with its two addresses. GET /truth is the times of the requests since the last one;
the server's own lateness is in them, the network and the client are not. A gap of 0 sends as fast as it can.
"""

# ruff: noqa: N802 - the service's methods are named as in the proto

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from weft.rpc.tls import ServerTls
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as generation
from weft.v1.gateway_service_pb2_grpc import GatewayServiceServicer, add_GatewayServiceServicer_to_server

now = time.perf_counter
CONTEXT = 100_000


@dataclass
class Truth:
    """One request as it was served: seconds of the clock that the client has, too."""

    received: float
    sent: list[float] = field(default_factory=list)
    is_cancelled: bool = False


class TimedServer(GatewayServiceServicer):
    """Both protocols on one event loop. `fail_every` refuses each so many-th request, `fail_after` all later
    ones; `knows_chunk_usage` is whether an HTTP client may ask for the count with each chunk; `is_breaking`
    ends each answer of more than two tokens half way.
    """

    def __init__(self, *, first_s: float = 0.02, gap_s: float = 0.005, per_message: int = 1) -> None:
        self.first_s, self.gap_s, self.per_message = first_s, gap_s, per_message
        self.fail_every = self.fail_after = 0
        self.is_breaking = False
        self.knows_chunk_usage = True
        self.tls: ServerTls | None = None
        self.api_key = ""
        self.truths: list[Truth] = []
        self.bodies: list[dict[str, Any]] = []
        self.num_requests = 0
        self.grpc_address = ""
        self.http_address = ""
        self._servers: list[Any] = []
        self._floods: dict[tuple[bool, int], bytes] = {}

    async def start(self) -> None:
        """Listen on two ports of 127.0.0.1 that are free."""
        server = grpc.aio.server()
        add_GatewayServiceServicer_to_server(self, server)
        if self.tls is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", self.tls.grpc_credentials())
        self.grpc_address = f"127.0.0.1:{port}"
        await server.start()
        context = None if self.tls is None else self.tls.context()
        http = await asyncio.start_server(self._http, "127.0.0.1", 0, ssl=context)
        self.http_address = f"127.0.0.1:{http.sockets[0].getsockname()[1]}"
        self._servers = [server, http]

    async def stop(self) -> None:
        """Let go."""
        await self._servers[0].stop(0)
        self._servers[1].close()

    def take_truth(self) -> list[dict[str, Any]]:
        """What was served since the last look."""
        found, self.truths = self.truths, []
        return [{"received": t.received, "sent": t.sent, "is_cancelled": t.is_cancelled} for t in found]

    async def messages(self, truth: Truth, num_tokens: int) -> AsyncIterator[int]:
        """The number of tokens of each message, when it is time to send it."""
        due, left = truth.received + self.first_s, num_tokens
        while left:
            count = min(left, self.per_message)
            if self.gap_s and (delay := due - now()) > 0:
                await asyncio.sleep(delay)
            due += self.gap_s
            left -= count
            truth.sent.append(now())
            yield count

    def _begin(self) -> Truth | None:
        truth = Truth(now())
        self.num_requests += 1
        if self.fail_every and self.num_requests % self.fail_every == 0:
            return None
        if self.fail_after and self.num_requests > self.fail_after:
            return None
        self.truths.append(truth)
        return truth

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """So many tokens as are asked for."""
        truth = self._begin()
        if truth is None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")
            return
        async for response in self._responses(request, truth):
            yield response
            if self.is_breaking and 2 * sum(self._counts(truth)) >= request.sampling.max_tokens:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")

    async def Multiplex(self, requests: Any, context: Any) -> AsyncIterator[pb.MultiplexResponse]:
        """The same, many on one stream."""
        outgoing: asyncio.Queue[pb.MultiplexResponse | None] = asyncio.Queue()
        running: dict[int, asyncio.Task[None]] = {}

        async def answer(stream_id: int, request: pb.GenerateRequest) -> None:
            truth, end = self._begin(), pb.StreamEnd()
            if truth is None:
                end.failure.code, end.failure.message = 8, "enough"
            else:
                async for response in self._responses(request, truth):
                    outgoing.put_nowait(pb.MultiplexResponse(stream_id=stream_id, response=response))
            outgoing.put_nowait(pb.MultiplexResponse(stream_id=stream_id, end=end))

        async def read() -> None:
            async for message in requests:
                if message.HasField("generate"):
                    task = asyncio.create_task(answer(message.stream_id, message.generate))
                    running[message.stream_id] = task
                elif (task := running.pop(message.stream_id, None)) is not None:
                    task.cancel()
            outgoing.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (response := await outgoing.get()) is not None:
                yield response
        finally:
            for task in (reading, *running.values()):
                task.cancel()

    def _counts(self, truth: Truth) -> list[int]:
        return [self.per_message] * len(truth.sent)

    async def _responses(
        self, request: pb.GenerateRequest, truth: Truth
    ) -> AsyncIterator[pb.GenerateResponse]:
        prompt_tokens = len(request.token_ids.ids) or len(request.text.split())
        yield pb.GenerateResponse(started=pb.Started(model="timed", prompt_tokens=prompt_tokens))
        num_tokens = request.sampling.max_tokens
        try:
            async for count in self.messages(truth, num_tokens):
                yield pb.GenerateResponse(delta=pb.Delta(text="word " * count, token_ids=[300] * count))
        except (asyncio.CancelledError, GeneratorExit):
            truth.is_cancelled = True
            raise
        usage = generation.Usage(prompt_tokens=prompt_tokens, completion_tokens=num_tokens)
        yield pb.GenerateResponse(finish=pb.Finish(reason=generation.FINISH_REASON_LENGTH, usage=usage))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """One. Asks for the key, as the first call of all."""
        if self.api_key and ("authorization", f"Bearer {self.api_key}") not in context.invocation_metadata():
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such key")
        return pb.ListModelsResponse(models=[pb.Model(name="timed", max_model_len=CONTEXT, vocab_size=5000)])

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """A word is a token."""
        return pb.TokenizeResponse(token_ids=[0, *range(300, 300 + len(request.text.split()))])

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
                body = await reader.readexactly(length)
                method, path = head.split(" ", 2)[:2]
                if self.api_key and f"authorization: bearer {self.api_key}\r" not in head:
                    _answer(writer, 401, {"error": {"message": "no such key"}})
                elif method == "get":
                    _answer(writer, 200, self._get(path))
                elif not await self._post(path, json.loads(body), writer):
                    break
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _get(self, path: str) -> Any:
        if path == "/truth":
            return self.take_truth()
        return {"data": [{"id": "timed", "max_model_len": CONTEXT}]}

    async def _post(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """False: the connection is to end here."""
        self.bodies.append(body)
        wants_counts = bool(body.get("stream_options", {}).get("continuous_usage_stats"))
        if wants_counts and not self.knows_chunk_usage:
            _answer(writer, 400, {"error": {"code": "unknown_parameter", "message": "unknown parameter"}})
            return True
        truth = self._begin()
        if truth is None:
            _answer(writer, 429, {"error": {"code": "rate_limit_exceeded", "message": "enough"}})
            return True
        is_chat = "/chat/" in path
        words = " ".join(m["content"] for m in body["messages"]) if is_chat else body["prompt"]
        prompt_tokens, num_tokens, done = len(words.split()), body["max_tokens"], 0
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        if is_chat:
            _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        if not self.gap_s and not self.is_breaking:
            await self._flood(writer, is_chat, num_tokens)
            truth.sent.append(now())
            num_tokens, done = 0, num_tokens
        async for count in self.messages(truth, num_tokens):
            done += count
            if self.is_breaking and num_tokens > 2 and done * 2 >= num_tokens:
                return False
            text = "word " * count
            content = {"delta": {"content": text}} if is_chat else {"text": text}
            event: dict[str, Any] = {"choices": [{"index": 0, **content, "finish_reason": None}]}
            if wants_counts:
                event["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": done}
            _event(writer, event)
            try:
                await writer.drain()
            except ConnectionError:
                truth.is_cancelled = True
                return False
        content = {"delta": {}} if is_chat else {"text": ""}
        _event(writer, {"choices": [{"index": 0, **content, "finish_reason": "length"}]})
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": done}
        _event(writer, {"choices": [], "usage": usage})
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return True

    async def _flood(self, writer: asyncio.StreamWriter, is_chat: bool, num_tokens: int) -> None:
        """All tokens at once, a chunk each, made beforehand: this process is to be the faster one."""
        if (is_chat, num_tokens) not in self._floods:
            content: dict[str, Any] = {"delta": {"content": "word "}} if is_chat else {"text": "word "}
            event = {"choices": [{"index": 0, **content, "finish_reason": None}]}
            data = _chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            self._floods[is_chat, num_tokens] = data * num_tokens
        writer.write(self._floods[is_chat, num_tokens])
        await writer.drain()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
    writer.write(_chunk(b"data: " + json.dumps(document).encode() + b"\n\n"))


def _answer(writer: asyncio.StreamWriter, status: int, document: Any) -> None:
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


async def serve(server: TimedServer) -> None:
    """Until standard input ends."""
    await server.start()
    print(json.dumps({"grpc": server.grpc_address, "http": server.http_address}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


def main() -> int:
    """Read the flags and serve."""
    parser = argparse.ArgumentParser(description="A server that sends tokens at known times.")
    parser.add_argument("--first-ms", type=float, default=20.0)
    parser.add_argument("--gap-ms", type=float, default=5.0)
    parser.add_argument("--per-message", type=int, default=1)
    flags = parser.parse_args()
    server = TimedServer(
        first_s=flags.first_ms / 1e3, gap_s=flags.gap_ms / 1e3, per_message=flags.per_message
    )
    asyncio.run(serve(server))
    return 0


if __name__ == "__main__":
    sys.exit(main())
