"""The clients of a fault run: each sends one request, over gRPC or HTTP, and tells a checker all that comes.

A stream that ends with a resume token is taken up again, as any client may do. Knows no fault and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import grpc
import httpx

from tools.chaos.calls import CALL_TIMEOUT_S, LOCAL, MultiplexClient, generate_events
from tools.chaos.checker import StreamCheck
from tools.chaos.workload import CANCELS, HTTP, MULTIPLEX, RETURNS, SLOW, Spec
from tools.mock_engine import oracle
from weft.rpc.errors import StatusError
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

MAX_RESUMES = 10
NUM_CHANNELS = 8
# Small windows, as those of a client that wants to be pushed back on: a slow reader is slow at once.
SLOW_OPTIONS = [
    *LOCAL,
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4096),
]
_PREFIX = "FINISH_REASON_"
_REASONS = {"stop": "STOP", "length": "LENGTH"}


class Counts:
    """What the clients did and met, all together."""

    def __init__(self) -> None:
        self.resumed = 0
        self.returned = 0
        self.cancelled = 0
        self.slow = 0


class Clients:
    """Connections to one gateway. `async with`, then `run` as often and as many at once as wanted."""

    def __init__(self, target: str, http: str = "", *, checks_logprobs: bool = True) -> None:
        self.counts = Counts()
        self._target = target
        self._http_url = f"http://{http}/v1/completions"
        self._checks_logprobs = checks_logprobs
        self._channels: list[grpc.aio.Channel] = []
        self._streams: list[MultiplexClient] = []
        self._http: httpx.AsyncClient | None = None
        self._next = 0

    async def __aenter__(self) -> Clients:
        self._channels = [grpc.aio.insecure_channel(self._target, options=LOCAL) for _ in range(NUM_CHANNELS)]
        self._streams = [MultiplexClient(GatewayServiceStub(channel)) for channel in self._channels]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        self._http = httpx.AsyncClient(timeout=CALL_TIMEOUT_S, limits=limits, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            await stream.close()
        for channel in self._channels:
            await channel.close(None)
        if self._http is not None:
            await self._http.aclose()

    async def run(self, spec: Spec, check: StreamCheck) -> None:
        """Run one request to its end. Whatever happens is in `check` afterwards."""
        self._next += 1
        counts = self.counts
        if spec.way == HTTP:
            is_cut = await self._run_http(spec, check)
        elif spec.way == MULTIPLEX:
            stream = self._streams[self._next % NUM_CHANNELS]
            is_cut = await self._run_events(spec, check, lambda request: stream.events(request))
        elif spec.behaviour == SLOW:
            counts.slow += 1
            async with grpc.aio.insecure_channel(self._target, options=SLOW_OPTIONS) as channel:
                stub = GatewayServiceStub(channel)
                is_cut = await self._run_events(spec, check, lambda request: generate_events(stub, request))
        else:
            stub = GatewayServiceStub(self._channels[self._next % NUM_CHANNELS])
            is_cut = await self._run_events(spec, check, lambda request: generate_events(stub, request))
        counts.cancelled += is_cut
        check.on_end(may_be_cut=is_cut)

    async def _run_events(self, spec: Spec, check: StreamCheck, open_events: Any) -> bool:
        """Read the events of a request; True when the client has broken it off."""
        request = spec.request()
        reading = Reading(spec, check, checks_logprobs=self._checks_logprobs)
        for _ in range(MAX_RESUMES):
            try:
                async with contextlib.aclosing(open_events(request)) as events:
                    async for response in events:
                        reading.take(response)
                        if reading.breaks_off:
                            break
                        if spec.behaviour == SLOW:
                            await asyncio.sleep(spec.read_delay_s)
            except StatusError as error:
                token = error.metadata.get("resume_token", "")
                if not token:
                    check.on_error(f"{error.code.name} {error.reason}: {error.message}")
                    return False
                self.counts.resumed += 1
                request = resumed(spec, token)
                await asyncio.sleep(error.retry_after_s or 0.1)
                continue
            if not reading.breaks_off:
                return False
            if spec.behaviour == CANCELS:
                return True
            self.counts.returned += 1
            request = reading.come_back()
            await asyncio.sleep(spec.read_delay_s)
        check.on_error("resumed too often")
        return False

    async def _run_http(self, spec: Spec, check: StreamCheck) -> bool:
        if self._http is None:
            raise RuntimeError("the clients are not open")
        num_characters = 0
        try:
            async with self._http.stream("POST", self._http_url, json=spec.document()) as response:
                if response.status_code != 200:
                    check.on_error(f"HTTP {response.status_code}: {(await response.aread())[:200]!r}")
                    return False
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    document = json.loads(line.removeprefix("data: "))
                    if "error" in document:
                        check.on_error(f"HTTP: {document['error']}")
                        return False
                    for choice in document["choices"]:
                        check.on_text(choice["index"], choice["text"], time.monotonic())
                        num_characters += len(choice["text"])
                        if choice["finish_reason"] is not None:
                            reason = _REASONS.get(choice["finish_reason"], choice["finish_reason"])
                            check.on_finish(choice["index"], reason)
                    if spec.behaviour == CANCELS and num_characters >= spec.cancel_after:
                        return True
        except httpx.HTTPError as error:
            check.on_error(f"HTTP: {type(error).__name__}: {error}")
        return False


class Reading:
    """One client's reading of one request, over one call or several."""

    def __init__(self, spec: Spec, check: StreamCheck, *, checks_logprobs: bool) -> None:
        self._spec = spec
        self._check = check
        self._checks_logprobs = checks_logprobs and spec.logprobs is not None
        # Of each sample: the newest next_offset, and the tokens that had come when it was first sent.
        self._places = [(0, 0)] * spec.num_samples
        self._is_back = False

    @property
    def breaks_off(self) -> bool:
        """Whether the client hangs up now."""
        check, spec = self._check, self._spec
        is_one = spec.behaviour == CANCELS or (spec.behaviour == RETURNS and not self._is_back)
        return is_one and check.num_tokens >= spec.cancel_after

    def take(self, response: pb.GenerateResponse) -> None:
        """Tell the checker of an event."""
        kind = response.WhichOneof("event")
        if kind == "finish":
            finish = response.finish
            reason = generation_pb2.FinishReason.Name(finish.reason).removeprefix(_PREFIX)
            self._check.on_finish(finish.sample_index, reason, finish.usage.completion_tokens)
        elif kind == "delta":
            delta = response.delta
            index = delta.sample_index
            steady = self._spec.behaviour != SLOW
            now = time.monotonic()
            self._check.on_delta(index, delta.token_ids, now, text=delta.text, counts_gap=steady)
            if index < len(self._places) and delta.next_offset != self._places[index][0]:
                self._places[index] = (delta.next_offset, len(self._check.samples[index].token_ids))
            if self._checks_logprobs and self._spec.logprobs is not None:
                check_logprobs(self._check, delta, self._spec.logprobs)

    def come_back(self) -> pb.GenerateRequest:
        """The request that goes on where this client stopped."""
        self._is_back = True
        request = self._spec.request()
        offsets = [offset for offset, _ in self._places]
        if len(offsets) == 1:
            request.resume_offset = offsets[0]
        else:
            request.resume_offsets.extend(offsets)
        for index, (_, num_tokens) in enumerate(self._places):
            self._check.on_return(index, num_tokens)
        return request


def resumed(spec: Spec, token: str) -> pb.GenerateRequest:
    """The request that goes on after the last event that came before the error with this token."""
    request = spec.request()
    request.ClearField("request_id")
    request.ClearField("resumable")
    request.resume_token = token
    return request


def check_logprobs(check: StreamCheck, delta: pb.Delta, count: int) -> None:
    """Hold a delta's log-probabilities against what mock engines tell."""
    if len(delta.logprobs) != len(delta.token_ids):
        check.on_logprobs(delta.sample_index, len(delta.logprobs), len(delta.token_ids))
        return
    for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True):
        told = (
            entry.chosen.token_id,
            entry.chosen.logprob,
            tuple((t.token_id, t.logprob) for t in entry.top),
        )
        expected = (token_id, oracle.logprob(token_id), oracle.top_logprobs(token_id, count))
        check.on_logprobs(delta.sample_index, told, expected)
