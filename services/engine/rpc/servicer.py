"""EngineService: what a caller may ask of the engine.

Turns calls into commands for the loop and the loop's events into messages. Knows no scheduling, no tensors,
and not who calls.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from services.engine.core.events import FinishedEvent, TokenEvent
from services.engine.core.sequence import FinishReason, Sequence
from services.engine.loop import EngineLoop, LinkEvents
from services.engine.rpc import convert
from services.engine.rpc.door import Door
from services.engine.rpc.errors import UNAVAILABLE_RETRY_S, shutting_down, status_error
from services.engine.rpc.link import Link, handed_over, read_hello
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.rpc.errors import StatusError, invalid_argument
from weft.v1 import engine_service_pb2 as pb
from weft.v1.engine_service_pb2_grpc import EngineServiceServicer

SERVICE_NAME = "weft.v1.EngineService"
DRAIN_REPORT_INTERVAL_S = 0.1
# After a drain's deadline the loop ends what is left within a step; longer than this, something hangs.
DRAIN_OVERTIME_S = 5.0
_SLOT = 0


class EngineServicer(EngineServiceServicer):
    """One engine on the wire. `on_drain` is told when a Drain call begins."""

    def __init__(
        self,
        loop: EngineLoop,
        info: pb.GetInfoResponse,
        *,
        on_drain: Callable[[], None] = lambda: None,
        limits: RequestLimits = DEFAULT_LIMITS,
    ) -> None:
        self._loop = loop
        self._info = info
        self._limits = limits
        self._on_drain = on_drain
        self._links: set[Link] = set()
        self._calls: set[_Call] = set()
        self._drain_deadline: float | None = None
        self._gone: StatusError | None = None
        self._door = Door(loop, max_queue_size=info.max_queue_size, max_batch_size=info.max_batch_size)

    @property
    def num_live(self) -> int:
        """Sequences that came in over any call and have not ended."""
        return sum(link.num_live for link in self._links) + sum(call.is_live for call in self._calls)

    async def Connect(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Any
    ) -> None:
        """The multiplexed link. A draining engine still opens links: their gateways learn it at once."""
        self._check_here()
        hello = await read_hello(request_iterator)
        self._check_here()
        link = Link(self._loop, self._door, self._info, hello, self._limits)
        self._links.add(link)
        try:
            if self._drain_deadline is not None:
                link.announce_drain(max(0.0, self._drain_deadline - self._loop.now()))
            await link.run(request_iterator, context)
        finally:
            self._links.discard(link)

    async def GenerateTokens(  # noqa: N802
        self, request: pb.GenerateTokensRequest, context: Any
    ) -> AsyncIterator[pb.GenerateTokensResponse]:
        """One request. Leaving the call, in whatever way, cancels it."""
        self._check_here()
        violations = convert.check(request, self._info, self._limits)
        if violations:
            raise invalid_argument(violations)
        refusal = self._door.refusal()
        if refusal is not None:
            raise status_error(refusal)
        remaining = context.time_remaining()
        deadline = None if remaining is None else self._loop.now() + remaining
        has_seed = request.sampling.HasField("seed")
        seed = request.sampling.seed if has_seed else secrets.randbits(64)
        call = _Call(self._loop, self._door)
        self._calls.add(call)
        try:
            call.submit(convert.sequence(request, self._info, seed=seed, deadline=deadline))
            is_first = True
            async for response in call.responses():
                if is_first:
                    response.seed, is_first = seed, False
                yield response
        finally:
            self._calls.discard(call)
            call.close()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:  # noqa: N802
        """What this engine is."""
        return self._info

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:  # noqa: N802
        """How busy it is."""
        return convert.load_response(self._loop.load(), is_draining=self._drain_deadline is not None)

    async def Drain(  # noqa: N802
        self, request: pb.DrainRequest, context: Any
    ) -> AsyncIterator[pb.DrainResponse]:
        """Stop admission and report until nothing is left."""
        self._on_drain()
        async for num_live in self.drain(request.deadline_ms / 1000):
            yield pb.DrainResponse(live=num_live)

    async def drain(self, deadline_s: float) -> AsyncIterator[int]:
        """Stop admission, tell the links, and yield the number of live sequences until it is 0.

        What is left at the deadline is cancelled. Raises StatusError when even that does not end it.
        """
        self._drain_deadline = self._loop.now() + deadline_s
        self._loop.drain(deadline_s)
        for link in self._links:
            link.announce_drain(deadline_s)
        while num_live := self.num_live:
            yield num_live
            if self._loop.now() > self._drain_deadline + DRAIN_OVERTIME_S:
                text = "the engine does not end its sequences"
                raise StatusError(
                    grpc.StatusCode.UNAVAILABLE, text, retry_after_s=UNAVAILABLE_RETRY_S, reason="DRAINING"
                )
            await asyncio.sleep(DRAIN_REPORT_INTERVAL_S)
        yield 0

    def fail_all(self, error: StatusError) -> None:
        """End every link and call with a status, and refuse new ones with it: the engine is going away."""
        self._gone = error
        for link in self._links:
            link.fail(error)
        for call in self._calls:
            call.fail(error)

    def _check_here(self) -> None:
        if self._gone is not None:
            raise self._gone


class _Call:
    """One GenerateTokens call: a link of its own with one slot."""

    def __init__(self, loop: EngineLoop, door: Door) -> None:
        self._loop = loop
        self._door = door
        self._is_unanswered = False
        self._tokens: list[TokenEvent] = []
        self._end: FinishedEvent | None = None
        self._failure: StatusError | None = None
        self._wake = asyncio.Event()
        self._link_id = loop.open_link(handed_over(self._on_events))

    @property
    def is_live(self) -> bool:
        """Whether the sequence has not ended yet."""
        return self._end is None and self._failure is None

    def submit(self, sequence: Sequence) -> None:
        self._is_unanswered = True
        self._door.num_unanswered += 1
        self._loop.submit(self._link_id, _SLOT, sequence)

    def close(self) -> None:
        self._answered()
        self._loop.close_link(self._link_id)

    def _answered(self) -> None:
        self._door.num_unanswered -= self._is_unanswered
        self._is_unanswered = False

    def fail(self, error: StatusError) -> None:
        self._failure = self._failure or error
        self._wake.set()

    def _on_events(self, events: LinkEvents) -> None:
        self._answered()
        for _, error in events.rejected:
            self.fail(status_error(error))
        self._tokens += events.tokens
        for _, end in events.finished:
            self._end = end
        self._wake.set()

    async def responses(self) -> AsyncIterator[pb.GenerateTokensResponse]:
        """Everything new since the last message, until the end. Bounded by the output's own length.

        A slow reader gets fewer, longer messages.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._failure is not None:
                raise self._failure
            end = self._end
            if end is None and not self._tokens:
                continue
            response = _response(self._tokens)
            self._tokens = []
            if end is None:
                yield response
                continue
            if end.error is not None:
                raise status_error(end.error)
            if end.reason is FinishReason.CANCELLED:
                # The caller has not cancelled, or this would not run: the engine has.
                raise shutting_down()
            response.finished.CopyFrom(convert.finished(_SLOT, end))
            yield response
            return


def _response(tokens: list[TokenEvent]) -> pb.GenerateTokensResponse:
    response = pb.GenerateTokensResponse(
        token_ids=[token.token_id for token in tokens], position=tokens[0].position if tokens else 0
    )
    for entry, token in enumerate(tokens):
        if token.logprob is not None:
            convert.add_logprobs(response.logprobs.add(entry=entry), token.logprob, token.top_logprobs)
    return response
