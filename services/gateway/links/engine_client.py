"""The gateway's end of the link to one engine: connect, greet, carry, watch, reconnect.

The only file that names the engine's stub. A link is up from an accepted Hello until the stream ends, an
engine that stopped beating is declared dead, or a step outlives its own bound. What the samples are is the
Multiplexer's matter; where a lost sample goes is the router's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from services.gateway.links.breaker import CircuitBreaker
from services.gateway.links.engine_load import EngineLoad
from services.gateway.links.greeting import EOF, greet
from services.gateway.links.multiplexer import LinkCounters, Multiplexer, ProtocolViolation
from services.gateway.links.outbox import LinkOutbox
from services.gateway.links.reconnect import keep_up
from services.gateway.links.slots import LinkSlots
from services.gateway.links.terms import EngineRefused, LinkLeft, LinkLost, LinkOwner, LinkTimes
from services.gateway.links.watchdog import Watchdog
from services.gateway.routing.prefixes import Owner
from services.gateway.streams.live import LiveSample
from services.gateway.text.assets import AssetError, ModelAssets
from weft import logs
from weft.rpc.channel import open_channel
from weft.rpc.tls import ChannelTls, TlsError
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

# An engine that beats every second when idle, and has not for so long, is not the first choice.
QUIET_S = 2.5
# An engine that was hung is given nothing before its step has ended; without any word of it, for so long.
SUSPECT_S = 3.0
# Tokens for so long are a success, whether or not an output has ended.
TRIED_S = 1.0
log = logs.get_logger("gateway.link")


class EngineLink(LinkSlots):
    """The link to the engine at `target`. `run` until cancelled; `is_up` says whether it stands."""

    def __init__(
        self,
        target: str,
        owner: LinkOwner,
        *,
        gateway_id: str,
        load_assets: Callable[[engine_pb.GetInfoResponse], Awaitable[ModelAssets]],
        api_key: str | None = None,
        tls: ChannelTls | None = None,
        times: LinkTimes | None = None,
        credit_bytes: int = 4 << 20,
    ) -> None:
        super().__init__()
        self.target = target
        self.counters = LinkCounters()
        self.breaker = CircuitBreaker()
        self.load = EngineLoad(engine_pb.GetInfoResponse())
        self.info: engine_pb.GetInfoResponse | None = None
        self.assets: ModelAssets | None = None
        self.is_draining = False
        self.is_leaving = False
        self.lost_at: float | None = None
        self.last_problem = "not connected yet"
        self._owner = owner
        self._gateway_id = gateway_id
        self._load_assets = load_assets
        self._api_key = api_key
        self._tls = tls
        self._times = times or LinkTimes()
        self._credit_bytes = credit_bytes
        self._up_at = 0.0
        self._failed_request = ""
        self._is_suspect = False
        self._outbox = LinkOutbox()
        self._watchdog = Watchdog(dead_s=self._times.dead_s, hung_s=self._times.hung_s)

    @property
    def is_usable(self) -> bool:
        """Whether the link takes samples."""
        is_here = self._multiplexer is not None and not self._is_suspect
        return is_here and not self.is_draining and not self.is_leaving

    @property
    def owner(self) -> Owner:
        """The engine in its present life."""
        return Owner(self.target, self.counters.sessions)

    def is_quiet(self, now: float) -> bool:
        """Whether an engine that beats when idle has been silent for long. What it has to do decides its
        life; this only whether it is given more.
        """
        return self.load.has_idle_beats and now - self._watchdog.heard_at > QUIET_S

    def submit(self, sample: LiveSample) -> None:
        """Send a sample. Raises LinkLost when the link is down: nothing was sent."""
        multiplexer = self._multiplexer
        if multiplexer is None:
            raise LinkLost(self.last_problem)
        now = self._now()
        if not multiplexer.num_live:
            self._watchdog.start(now)
            self.load.rest()
        self.breaker.begin(now)
        self.load.sent(len(sample.request.resolved.prompt_token_ids) + len(sample.token_ids))
        sample.link = self
        multiplexer.submit(sample)

    def on_pause(self) -> None:
        """Of the slots: a sample was paused. It gives its place in the batch up, so there is room for
        another.
        """
        self._owner.on_room(self)

    def set_leaving(self, is_leaving: bool) -> None:
        """Whether the engine is to be left: then no sample goes there, and `run` ends with the last one."""
        if self.is_leaving != is_leaving:
            self.is_leaving = is_leaving
            self._owner.on_link_change(self)

    async def run(self) -> None:
        """Connect and reconnect until cancelled, or left."""
        await keep_up(self, self._times)

    async def session(self) -> None:
        """One epoch, from connect to loss. Every way out cancels the call and hands back the samples."""
        try:
            channel = open_channel(self.target, self._api_key, tls=self._tls)
        except TlsError as error:
            raise LinkLost(str(error)) from error
        tasks: list[asyncio.Task[None]] = []
        call = EngineServiceStub(channel).Connect()
        try:
            hello = await greet(call, self._gateway_id, self._credit_bytes, self._times.hello_s)
            try:
                assets = await self._load_assets(hello.info)
            except AssetError as error:
                raise EngineRefused(str(error)) from error
            self._up(hello, assets)
            tasks = [
                asyncio.create_task(work(call)) for work in (self._read, self._watch, self._outbox.write)
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._down()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()
            await channel.close(None)

    def _up(self, hello: engine_pb.EngineHello, assets: ModelAssets) -> None:
        self.info, self.assets = hello.info, assets
        self.last_problem = ""  # the same again is news again
        self.is_draining = False
        self.load = EngineLoad(hello.info)
        self._up_at = self._now()
        if self._is_suspect:
            asyncio.get_running_loop().call_later(SUSPECT_S, self._trust_silent, self.counters.sessions + 1)
        self._watchdog.start(self._up_at)
        self.breaker.connect(self._up_at)
        self.counters.sessions += 1
        self._outbox.clear()
        self._multiplexer = Multiplexer(
            hello.epoch,
            send=self._outbox.send,
            owner=self,
            now=self._now,
            counters=self.counters,
            credit_bytes=self._credit_bytes,
        )
        log.info("engine up", target=self.target, model=hello.info.model_name, epoch=hello.epoch)
        self._owner.on_link_change(self)

    def _down(self) -> None:
        """Take the link out of service and hand its samples back. May come twice."""
        multiplexer, self._multiplexer = self._multiplexer, None
        if multiplexer is None:
            return
        self.lost_at = now = self._now()
        samples = multiplexer.drop_all()
        # An engine that said that it would go has died of no request.
        is_blamed = not self.is_draining and not self.is_leaving
        if samples and is_blamed:
            self.breaker.fail(now)
        for sample in samples:
            sample.link = None
        self._owner.on_link_change(self)
        for sample in samples:
            self._owner.on_lost(sample, is_blamed=is_blamed)

    def on_slot_lost(self, sample: LiveSample) -> None:
        """Of the Multiplexer: the sample's tokens can no longer follow."""
        self._owner.on_lost(sample, is_blamed=not self.is_draining)

    def on_slot_refused(self, sample: LiveSample, failure: pb.Failure) -> None:
        """Of the Multiplexer: no room."""
        self._owner.on_refused(sample, failure, self.target)

    def on_slot_free(self) -> None:
        """Of the Multiplexer: a slot came free."""
        self.load.freed(self._now())
        if not self.num_live:
            self.load.rest()
        self._owner.on_room(self)

    def on_slot_failed(self, request_id: str) -> None:
        """Of the Multiplexer: the engine's own fault. A request counts once, however many samples it has."""
        if request_id != self._failed_request:
            self._failed_request = request_id
            self.breaker.fail(self._now())

    def on_slot_worked(self) -> None:
        """Of the Multiplexer: an output ended as it should."""
        self.breaker.succeed()

    async def _read(self, call: Any) -> None:
        while True:
            response = await call.read()
            if response is EOF:
                raise LinkLost("the engine ended the stream")
            now = self._now()
            self._watchdog.hear(now)
            self._dispatch(response, now)

    def _dispatch(self, response: engine_pb.ConnectResponse, now: float) -> None:
        multiplexer = self._multiplexer
        if multiplexer is None:
            raise LinkLost("the link is down")
        kind = response.WhichOneof("event")
        if kind == "frame":
            self.load.frame(now)
            multiplexer.on_frame(response.frame)
            if not self.breaker.is_sound and now - self._up_at > TRIED_S:
                self.breaker.succeed()
        elif kind == "accepted":
            multiplexer.on_accepted(response.accepted)
        elif kind == "rejected":
            multiplexer.on_rejected(response.rejected)
        elif kind == "heartbeat":
            self._on_heartbeat(response.heartbeat, multiplexer, now)
        elif kind == "draining":
            self.is_draining = True
            self.lost_at = now
            self._owner.on_link_change(self)
        elif kind == "hello":
            raise ProtocolViolation("a second Hello")

    def _on_heartbeat(self, beat: engine_pb.Heartbeat, multiplexer: Multiplexer, now: float) -> None:
        if beat.epoch != multiplexer.epoch:
            self.counters.dropped_epoch += 1
            return
        self._watchdog.beat(beat)
        if self._is_suspect and not self._watchdog.is_hung:
            self._trust()
        room = self.load.room(multiplexer.num_live)
        self.load.beat(beat, multiplexer.num_live)
        if self.load.room(multiplexer.num_live) > room or beat.waiting:
            self._owner.on_room(self)
        self._check_life(now)

    def _check_life(self, now: float) -> None:
        """Raise LinkLost when an engine that has something to do is dead or hung."""
        if self.num_live and (problem := self._watchdog.problem(now)) is not None:
            self._is_suspect = self._watchdog.is_hung
            raise LinkLost(problem)

    def _trust(self) -> None:
        """The step that hung is over: give the engine samples again."""
        self._is_suspect = False
        self._owner.on_link_change(self)

    def _trust_silent(self, session: int) -> None:
        """A while after a session began: an engine that tells nothing of its steps is trusted."""
        if self._is_suspect and session == self.counters.sessions and not self._watchdog.has_beat:
            self._trust()

    async def _watch(self, _call: Any) -> None:
        """Look at the link every tick, and when silence would mean death; raise LinkLost when that is so."""
        times, watchdog = self._times, self._watchdog
        planned_s = 0.0
        while True:
            watchdog.look(self._now(), planned_s)
            due_s = watchdog.due_s(self._now()) if self.num_live else times.tick_s
            planned_s = min(times.tick_s, max(due_s, 0.001))
            await asyncio.sleep(planned_s)
            watchdog.look(self._now(), planned_s)
            planned_s = 0.0
            self._check_life(self._now())
            if self.is_leaving and not self.num_live:
                raise LinkLeft

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
