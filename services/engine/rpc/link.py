"""One Connect stream: the commands of a gateway in, its frames out.

A link owns a reader, a writer and a heartbeat; whichever ends first ends the link, and the one `finally`
cancels all that came over it. Knows the loop's commands; knows neither scheduling nor tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from services.engine.core.sequence import Sequence
from services.engine.loop import EngineLoop, LinkEvents
from services.engine.rpc import convert
from services.engine.rpc.door import Door
from services.engine.rpc.errors import status_error
from services.engine.rpc.outbox import Outbox
from weft import logs
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.rpc.errors import StatusError, internal_error, invalid_argument, new_error_id
from weft.sampling import validate_labels
from weft.v1 import engine_service_pb2 as pb

HEARTBEAT_INTERVAL_S = 0.2
# With nothing live there is a beat once in so many intervals: it says how busy others keep the engine.
IDLE_INTERVALS = 5
HELLO_TIMEOUT_S = 10.0
MAX_GATEWAY_ID_CHARS = 128
# What is for ever; a longer one may round up to more than the field holds.
MAX_DRAIN_MS = 1 << 53

log = logs.get_logger("engine.link")


def check_hello(first: pb.ConnectRequest | None) -> pb.GatewayHello:
    """The hello of a link. Raises StatusError when something else came first, or another protocol version."""
    if first is None or first.WhichOneof("command") != "hello":
        raise invalid_argument([("command", "the first message must be a hello")])
    hello = first.hello
    if hello.protocol_version != convert.PROTOCOL_VERSION:
        raise StatusError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"protocol version {hello.protocol_version} is not spoken here, only {convert.PROTOCOL_VERSION}",
            reason="PROTOCOL_VERSION",
        )
    if len(hello.gateway_id) > MAX_GATEWAY_ID_CHARS:
        raise invalid_argument([("hello.gateway_id", f"must have at most {MAX_GATEWAY_ID_CHARS} characters")])
    return hello


def new_epoch() -> int:
    """A number that no other link has, on this process or another: 63 random bits, never 0."""
    return secrets.randbits(63) | 1


def handed_over(on_events: Callable[[LinkEvents], None]) -> Callable[[LinkEvents], None]:
    """`on_events` on the running event loop, as a callback for another thread that never waits."""
    events_loop = asyncio.get_running_loop()

    def deliver(events: LinkEvents) -> None:
        events_loop.call_soon_threadsafe(on_events, events)

    return deliver


class Link:
    """The state of one Connect stream, from its hello to its end. Lives on the event loop."""

    def __init__(
        self,
        loop: EngineLoop,
        door: Door,
        info: pb.GetInfoResponse,
        hello: pb.GatewayHello,
        limits: RequestLimits = DEFAULT_LIMITS,
    ) -> None:
        self.epoch = new_epoch()
        self._loop = loop
        self._door = door
        self._info = info
        self._limits = limits
        self._gateway_id = hello.gateway_id
        self._outbox = Outbox(self.epoch, hello.initial_credit_bytes)
        self._wake = asyncio.Event()
        self._live: dict[int, str] = {}
        self._unanswered: set[int] = set()
        self._is_open = True
        self._is_writing = False
        self._failure: StatusError | None = None
        self._failed = asyncio.Event()
        # Runs on the engine's thread: hands over and returns. Frames are packed on the event loop.
        self._link_id = loop.open_link(handed_over(self._on_events))

    @property
    def num_live(self) -> int:
        """Slots submitted whose end has not been sent; at least 1 while anything waits to be sent."""
        return len(self._live) or int(self._is_writing or self._outbox.num_pending > 0)

    async def run(self, requests: AsyncIterator[pb.ConnectRequest], context: Any) -> None:
        """Serve the link until either side ends it. Raises StatusError when the engine does."""
        log.info("link opened", epoch=self.epoch, gateway=self._gateway_id, peer=context.peer())
        hello = pb.EngineHello(protocol_version=convert.PROTOCOL_VERSION, epoch=self.epoch, info=self._info)
        tasks: list[asyncio.Task[None]] = []
        try:
            await context.write(pb.ConnectResponse(hello=hello))
            tasks = [
                asyncio.create_task(part)
                for part in (
                    self._read(requests),
                    self._write(context),
                    self._beat(),
                    self._wait_for_failure(),
                )
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._is_open = False
            self._loop.close_link(self._link_id)
            self._door.num_unanswered -= len(self._unanswered)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            log.info("link closed", epoch=self.epoch, gateway=self._gateway_id, cancelled=len(self._live))

    def fail(self, error: StatusError) -> None:
        """End the link with a status."""
        if self._failure is None:
            self._failure = error
            self._failed.set()

    def announce_drain(self, deadline_s: float) -> None:
        """Tell the gateway to move on what it can."""
        deadline_ms = int(min(1000 * deadline_s, MAX_DRAIN_MS))
        draining = pb.Draining(epoch=self.epoch, deadline_ms=deadline_ms)
        self._queue_reply(pb.ConnectResponse(draining=draining))

    async def _wait_for_failure(self) -> None:
        await self._failed.wait()
        if self._failure is not None:
            raise self._failure

    def _on_events(self, events: LinkEvents) -> None:
        """Take in what the loop delivers. Silence is no answer: what fails here ends the link."""
        if not self._is_open:
            return
        try:
            self._take(events)
        except StatusError as error:
            self.fail(error)
        except Exception as error:
            error_id = new_error_id()
            log.failure("delivery failed", error, error_id=error_id, epoch=self.epoch)
            self.fail(internal_error(error_id))
        self._wake.set()

    def _take(self, events: LinkEvents) -> None:
        for slot in (*events.accepted, *(slot for slot, _ in events.rejected)):
            self._unanswered.discard(slot)
            self._door.num_unanswered -= 1
        for slot, refusal in events.rejected:
            self._log_end("rejected", self._live.pop(slot, ""), slot, refusal)
        for slot, end in events.finished:
            request_id = self._live.pop(slot, "")
            if end.error is not None:
                self._log_end("failed", request_id, slot, end.error)
        self._outbox.add(events)

    def _log_end(self, event: str, request_id: str, slot: int, error: Exception) -> None:
        # The key is how the core's own log lines name the sequence.
        log.info(event, request=request_id, key=(self._link_id, slot), epoch=self.epoch, reason=str(error))

    def _queue_reply(self, message: pb.ConnectResponse) -> None:
        try:
            self._outbox.reply(message)
        except StatusError as error:
            self.fail(error)
        self._wake.set()

    async def _write(self, context: Any) -> None:
        while True:
            while (message := self._outbox.next_message()) is not None:
                self._is_writing = True
                await context.write(message)
                self._is_writing = False
            self._wake.clear()
            await self._wake.wait()

    async def _beat(self) -> None:
        num_silent = 0
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            num_silent += 1
            # Until the last end is sent: a gateway that waits for it takes silence for death.
            if self.num_live or num_silent >= IDLE_INTERVALS:
                num_silent = 0
                self._outbox.beat(self._loop.heartbeat())
                self._wake.set()

    async def _read(self, requests: AsyncIterator[pb.ConnectRequest]) -> None:
        async for request in requests:
            command = request.WhichOneof("command")
            if command == "submit":
                self._submit(request.submit)
            elif command == "credit":
                self._outbox.add_credit(request.credit.bytes)
                self._wake.set()
            elif command in ("cancel", "pause", "resume", "update"):
                self._steer(command, getattr(request, command))
            else:
                what = "a hello comes once" if command == "hello" else "must be set, to a command known here"
                raise invalid_argument([("command", what)])

    def _submit(self, submit: pb.Submit) -> None:
        """Hand a sequence to the loop, or refuse it. Whatever goes wrong here is that slot's alone."""
        slot = submit.slot
        if slot in self._live:
            live = StatusError(grpc.StatusCode.ALREADY_EXISTS, "the slot is live already", reason="SLOT_LIVE")
            self._reject(slot, live)
            return
        try:
            violations = convert.check(submit, self._info, self._limits)
            sequence = None if violations else self._sequence(submit)
        except Exception as error:
            error_id = new_error_id()
            log.failure("submit failed", error, error_id=error_id, request=submit.request_id)
            self._reject(slot, internal_error(error_id))
            return
        if sequence is None:
            self._reject(slot, invalid_argument(violations))
            return
        refusal = self._door.refusal()
        if refusal is not None:
            self._reject(slot, status_error(refusal))
            return
        self._unanswered.add(slot)
        self._door.num_unanswered += 1
        self._live[slot] = submit.request_id
        self._loop.submit(self._link_id, slot, sequence)

    def _sequence(self, submit: pb.Submit) -> Sequence:
        deadline = self._deadline(submit.budget_ms) if submit.HasField("budget_ms") else None
        return convert.sequence(submit, self._info, seed=submit.sampling.seed, deadline=deadline)

    def _reject(self, slot: int, error: StatusError) -> None:
        self._outbox.reject(slot, error)
        self._wake.set()

    def _steer(self, command: str, message: pb.Cancel | pb.Pause | pb.Resume | pb.Update) -> None:
        """Pass a command for a slot on. A slot that is not live is ignored: its end has crossed the
        command.
        """
        if isinstance(message, pb.Update):
            violations = validate_labels(priority=message.priority)
            if found := [(f"update.{name}", text) for name, text in violations]:
                raise invalid_argument(found)
        if message.slot not in self._live:
            return
        if isinstance(message, pb.Update):
            self._loop.update(
                self._link_id,
                message.slot,
                priority=message.priority if message.HasField("priority") else None,
                deadline=self._deadline(message.budget_ms) if message.HasField("budget_ms") else None,
            )
            return
        tell = {"cancel": self._loop.cancel, "pause": self._loop.pause, "resume": self._loop.resume}
        tell[command](self._link_id, message.slot)

    def _deadline(self, budget_ms: int) -> float:
        return self._loop.now() + budget_ms / 1000


async def read_hello(requests: AsyncIterator[pb.ConnectRequest]) -> pb.GatewayHello:
    """The first message of a stream, checked, within `HELLO_TIMEOUT_S`. Raises StatusError."""
    first: pb.ConnectRequest | None = None
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            with contextlib.suppress(StopAsyncIteration):
                first = await anext(requests)
    except TimeoutError:
        raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello came") from None
    return check_hello(first)
