"""The gateway's end of the link to one engine: connect, greet, carry, watch, reconnect.

The only file that names the engine's stub. A link is up from an accepted Hello until the stream ends, an
engine that stopped beating is declared dead, or a step outlives its own bound. What the samples are is the
Multiplexer's matter; where a lost sample goes is the router's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from services.gateway.assets import AssetError, ModelAssets
from services.gateway.live import LiveSample
from services.gateway.multiplexer import LinkCounters, Multiplexer, ProtocolViolation
from services.gateway.watchdog import Watchdog
from weft import logs
from weft.rpc.channel import open_channel
from weft.rpc.errors import new_error_id
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

PROTOCOL_VERSION = 1
# The library's mark for the end of a stream; its type stubs do not know it.
_EOF: Any = vars(grpc.aio)["EOF"]
log = logs.get_logger("gateway.link")


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """How long the link waits for what, in seconds."""

    hello_s: float = 10.0
    dead_s: float = 1.0
    hung_s: float = 1.0
    tick_s: float = 0.1
    min_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    refused_backoff_s: float = 5.0


class LinkLost(Exception):
    """The link ended. The text says why."""


class EngineRefused(Exception):
    """The engine that answered is not one this gateway may use."""


class EngineLink:
    """The link to the engine at `target`. `run` until cancelled; `is_up` says whether it takes samples."""

    def __init__(
        self,
        target: str,
        *,
        gateway_id: str,
        load_assets: Callable[[engine_pb.GetInfoResponse], Awaitable[ModelAssets]],
        on_change: Callable[[EngineLink], None],
        on_lost: Callable[[LiveSample], None],
        on_busy: Callable[[LiveSample, float], None],
        api_key: str | None = None,
        times: LinkTimes | None = None,
        credit_bytes: int = 4 << 20,
    ) -> None:
        self.target = target
        self.counters = LinkCounters()
        self.info: engine_pb.GetInfoResponse | None = None
        self.assets: ModelAssets | None = None
        self.is_draining = False
        self.lost_at: float | None = None
        self.last_problem = "not connected yet"
        self._gateway_id = gateway_id
        self._load_assets = load_assets
        self._on_change = on_change
        self._on_lost = on_lost
        self._on_busy = on_busy
        self._api_key = api_key
        self._times = times or LinkTimes()
        self._credit_bytes = credit_bytes
        self._multiplexer: Multiplexer | None = None
        self._outbox: deque[engine_pb.ConnectRequest] = deque()
        self._has_mail = asyncio.Event()
        self._watchdog = Watchdog(dead_s=self._times.dead_s, hung_s=self._times.hung_s)

    @property
    def is_up(self) -> bool:
        """Whether a Hello was accepted and the link still stands."""
        return self._multiplexer is not None

    @property
    def num_live(self) -> int:
        """Slots in use."""
        return self._multiplexer.num_live if self._multiplexer else 0

    def submit(self, sample: LiveSample) -> None:
        """Send a sample. Raises LinkLost when the link is down: nothing was sent."""
        multiplexer = self._multiplexer
        if multiplexer is None:
            raise LinkLost(self.last_problem)
        if not multiplexer.num_live:
            self._watchdog.start(self._now())
        sample.link = self
        sample.route.num_placements += 1
        multiplexer.submit(sample)

    def cancel(self, sample: LiveSample) -> None:
        """Ask for the end of a sample."""
        if self._multiplexer is not None:
            self._multiplexer.cancel(sample)

    def pause(self, sample: LiveSample) -> None:
        """Stop scheduling a sample."""
        if self._multiplexer is not None:
            self._multiplexer.pause(sample)

    def resume(self, sample: LiveSample) -> None:
        """Schedule a sample again."""
        if self._multiplexer is not None:
            self._multiplexer.resume(sample)

    def detach(self, sample: LiveSample) -> None:
        """Forget a sample and cancel its slot."""
        if self._multiplexer is not None:
            self._multiplexer.detach(sample)

    async def run(self) -> None:
        """Connect and reconnect until cancelled."""
        backoff_s = self._times.min_backoff_s
        while True:
            num_sessions = self.counters.sessions
            try:
                await self._session()
            except EngineRefused as error:
                self._note(f"refused: {error}")
                backoff_s = self._times.refused_backoff_s
            except (LinkLost, ProtocolViolation) as error:
                self._note(str(error))
            except grpc.aio.AioRpcError as error:
                self._note(f"{error.code().name}: {error.details()}")
            except Exception as error:  # whatever an engine or its files do, the next try may find another
                self._note(f"internal error: {type(error).__name__}", error)
                backoff_s = self._times.refused_backoff_s
            if self.counters.sessions > num_sessions:
                backoff_s = self._times.min_backoff_s
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, self._times.max_backoff_s)

    async def _session(self) -> None:
        """One epoch, from connect to loss. Every way out cancels the call and hands back the samples."""
        channel = open_channel(self.target, self._api_key)
        tasks: list[asyncio.Task[None]] = []
        call = EngineServiceStub(channel).Connect()
        try:
            hello = await self._greet(call)
            assets = await self._assets_for(hello.info)
            self._up(hello, assets)
            tasks = [asyncio.create_task(work(call)) for work in (self._read, self._watch, self._write)]
            done, _ = await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._down()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()
            await channel.close(None)

    async def _greet(self, call: Any) -> engine_pb.EngineHello:
        hello = engine_pb.GatewayHello(
            protocol_version=PROTOCOL_VERSION,
            gateway_id=self._gateway_id,
            initial_credit_bytes=self._credit_bytes,
        )
        try:
            async with asyncio.timeout(self._times.hello_s):
                # A call that failed already cannot be written to; the read says why it failed.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await call.write(engine_pb.ConnectRequest(hello=hello))
                response = await call.read()
        except TimeoutError:
            raise LinkLost("no Hello came") from None
        if response is _EOF:
            raise LinkLost("the engine ended the stream before its Hello")
        if response.WhichOneof("event") != "hello":
            raise ProtocolViolation("the first message is no Hello")
        answer: engine_pb.EngineHello = response.hello
        if answer.protocol_version != PROTOCOL_VERSION:
            raise EngineRefused(f"it speaks version {answer.protocol_version} of the link's protocol")
        return answer

    async def _assets_for(self, info: engine_pb.GetInfoResponse) -> ModelAssets:
        try:
            if info.vocab_size < 1 or info.max_model_len < 2:
                raise EngineRefused("it has no vocabulary or no context")
            return await self._load_assets(info)
        except AssetError as error:
            raise EngineRefused(str(error)) from error

    def _up(self, hello: engine_pb.EngineHello, assets: ModelAssets) -> None:
        self.info, self.assets = hello.info, assets
        self.is_draining = False
        self.counters.sessions += 1
        self._outbox.clear()
        self._multiplexer = Multiplexer(
            hello.epoch,
            send=self._send,
            on_lost=self._on_lost,
            on_busy=self._on_busy,
            now=self._now,
            counters=self.counters,
            credit_bytes=self._credit_bytes,
        )
        log.info("engine up", target=self.target, model=hello.info.model_name, epoch=hello.epoch)
        self._on_change(self)

    def _down(self) -> None:
        """Take the link out of service and hand its samples back. May come twice."""
        multiplexer, self._multiplexer = self._multiplexer, None
        if multiplexer is None:
            return
        self.lost_at = self._now()
        samples = multiplexer.drop_all()
        for sample in samples:
            sample.link = None
        self._on_change(self)
        for sample in samples:
            self._on_lost(sample)

    def _send(self, command: engine_pb.ConnectRequest) -> None:
        self._outbox.append(command)
        self._has_mail.set()

    async def _write(self, call: Any) -> None:
        """Commands, in order. A write that fails is a stream that ended, and the reader says why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                while self._outbox:
                    await call.write(self._outbox.popleft())
                self._has_mail.clear()
                await self._has_mail.wait()

    async def _read(self, call: Any) -> None:
        while True:
            response = await call.read()
            if response is _EOF:
                raise LinkLost("the engine ended the stream")
            self._watchdog.hear(self._now())
            self._dispatch(response)

    def _dispatch(self, response: engine_pb.ConnectResponse) -> None:
        multiplexer = self._multiplexer
        if multiplexer is None:
            raise LinkLost("the link is down")
        kind = response.WhichOneof("event")
        if kind == "frame":
            multiplexer.on_frame(response.frame)
        elif kind == "accepted":
            multiplexer.on_accepted(response.accepted)
        elif kind == "rejected":
            multiplexer.on_rejected(response.rejected)
        elif kind == "heartbeat":
            if response.heartbeat.epoch == multiplexer.epoch:
                self._watchdog.beat(response.heartbeat)
            else:
                self.counters.dropped_epoch += 1
        elif kind == "draining":
            self.is_draining = True
            self._on_change(self)
        elif kind == "hello":
            raise ProtocolViolation("a second Hello")

    async def _watch(self, _call: Any) -> None:
        """Look at the link every tick; raise LinkLost when it is dead or hung."""
        times = self._times
        while True:
            before = self._now()
            await asyncio.sleep(times.tick_s)
            now = self._now()
            if now - before > times.tick_s + times.dead_s / 2:
                self._watchdog.hear(now)  # it was this process that stood still
            elif self.num_live and (problem := self._watchdog.problem(now)) is not None:
                raise LinkLost(problem)

    def _note(self, problem: str, error: Exception | None = None) -> None:
        if problem != self.last_problem:
            log.warning("link down", target=self.target, reason=problem)
            if error is not None:
                log.failure("unhandled exception", error, target=self.target, error_id=new_error_id())
        self.last_problem = problem

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
