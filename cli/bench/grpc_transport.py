"""Requests over gRPC, one call each: `weft.v1.GatewayService.Generate`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from cli.bench.records import CANCELLED, FAILED, INTERRUPTED, OK, Record
from cli.bench.settings import ServerSettings, Settings
from cli.bench.transport import BenchError, Exchange, Facts, now
from cli.bench.vocabulary import WORDS, TokenIds
from weft.rpc.auth import auth_metadata
from weft.rpc.channel import channel_options
from weft.rpc.errors import error_from_call
from weft.rpc.tls import ChannelTls, TlsError
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as generation
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

CONNECT_S = 10.0
CALL_S = 60.0
STREAMS_PER_CHANNEL = 64
MAX_CHANNELS = 8
_EOF: Any = vars(grpc.aio)["EOF"]
_REASONS = {
    generation.FINISH_REASON_STOP: "stop",
    generation.FINISH_REASON_LENGTH: "length",
    generation.FINISH_REASON_CANCELLED: "cancelled",
    generation.FINISH_REASON_DEADLINE: "deadline",
    generation.FINISH_REASON_ERROR: "error",
}


class GrpcTransport:
    """Calls over several connections, taken in turn."""

    def __init__(self, settings: Settings, concurrency: int) -> None:
        self._settings = settings
        wanted = settings.server.num_channels or -(-concurrency // STREAMS_PER_CHANNEL)
        self._num_channels = settings.server.num_channels or min(wanted, MAX_CHANNELS)
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[Any] = []
        self._metadata = auth_metadata(settings.server.api_key)
        self._count = 0
        self._facts: Facts | None = None

    @property
    def stubs(self) -> list[Any]:
        """One for each connection."""
        return self._stubs

    async def open(self) -> None:
        """Connect every channel, so that no request pays for it."""
        server = self._settings.server
        for _ in range(self._num_channels):
            self._channels.append(_channel(server))
        try:
            async with asyncio.timeout(CONNECT_S):
                for channel in self._channels:
                    await _ready(channel, server.target)
        except TimeoutError:
            raise BenchError(f"UNAVAILABLE: nobody answers at {server.target}") from None
        self._stubs = [GatewayServiceStub(channel) for channel in self._channels]

    async def facts(self, *, needs_vocabulary: bool) -> Facts:
        """The model, and ids to make prompts of."""
        asked = self._settings.server.model
        try:
            listed = await self._call("ListModels", pb.ListModelsRequest())
            model = _chosen(list(listed.models), asked)
            words = " ".join(WORDS)
            request = pb.TokenizeRequest(model=asked, text=words)
            ids = await self._call("Tokenize", request) if needs_vocabulary else None
        except grpc.aio.AioRpcError as error:
            raise BenchError(told(error)) from None
        # The first id may be the begin token, which belongs to no word.
        pool = tuple(sorted(set(ids.token_ids[1:]))) if ids is not None else (0,)
        facts = Facts(
            model=model.name,
            vocabulary=TokenIds(pool),
            max_model_len=model.max_model_len or None,
            version=model.version,
            digest=model.artifact_digest,
            more={"is_deterministic": model.is_deterministic, "numerics_id": model.numerics_id},
        )
        self.use(facts)
        return facts

    def use(self, facts: Facts) -> None:
        """Nothing but the model's name matters to a call."""
        self._facts = facts

    def request(self, exchange: Exchange) -> pb.GenerateRequest:
        """The message of one request."""
        workload = self._settings.workload
        sampling = generation.SamplingParams(max_tokens=exchange.max_tokens, seed=exchange.seed)
        if workload.is_ignoring_eos:
            sampling.ignore_eos = True
        if workload.temperature is not None:
            sampling.temperature = workload.temperature
        message = pb.GenerateRequest(
            model=self._settings.server.model,
            sampling=sampling,
            session_id=exchange.session_id,
            cache_salt=self._settings.cache_salt,
        )
        if isinstance(exchange.prompt, str):
            if self._settings.server.endpoint == "chat":
                message.chat.messages.add(role="user", content=exchange.prompt)
            else:
                message.text = exchange.prompt
        else:
            message.token_ids.ids.extend(exchange.prompt)
        return message

    async def run(self, exchange: Exchange) -> None:
        """One call."""
        record = exchange.record
        request = self.request(exchange)
        stub = self._stubs[self._count % len(self._stubs)]
        self._count += 1
        record.sent = now()
        call = stub.Generate(request, timeout=self._settings.timeout_s, metadata=self._metadata)
        try:
            while (event := await call.read()) is not _EOF:
                if take(record, event, now()):
                    record.ended(now(), CANCELLED)
                    return
                if exchange.pause_s and event.HasField("delta"):
                    await asyncio.sleep(exchange.pause_s)
            if record.finish:
                finished(record, now())
                return
            # The end of a stream is no end of its call: the status comes behind it.
            code = await call.code()
            if code is grpc.StatusCode.OK:
                record.ended(now(), FAILED, "INCOMPLETE", "the stream ended without a finish")
            else:
                record.ended(now(), FAILED, code.name, await call.details() or "")
        except grpc.aio.AioRpcError as error:
            record.ended(now(), FAILED, error.code().name, reason_of(error))
        except asyncio.CancelledError:
            record.ended(now(), INTERRUPTED)
            raise
        except Exception as error:
            record.ended(now(), FAILED, "CLIENT", f"{type(error).__name__}: {error}")
        finally:
            call.cancel()

    async def begin_session(self, session_id: str) -> bool:
        """A session of the server."""
        request = pb.CreateSessionRequest(session_id=session_id, model=self._settings.server.model)
        try:
            await self._call("CreateSession", request)
        except grpc.aio.AioRpcError as error:
            raise BenchError(told(error)) from None
        return True

    async def end_session(self, session_id: str) -> None:
        """Delete it."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._call("DeleteSession", pb.DeleteSessionRequest(session_id=session_id))

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close(None)

    async def _call(self, method: str, request: Any) -> Any:
        call = getattr(self._stubs[0], method)
        return await call(request, timeout=CALL_S, metadata=self._metadata)


def take(record: Record, event: pb.GenerateResponse, at: float) -> bool:
    """Write one event down. True: the request is to be cancelled now."""
    kind = event.WhichOneof("event")
    if kind == "delta":
        num_tokens = len(event.delta.token_ids)
        return bool(num_tokens) and record.arrived(at, num_tokens)
    if kind == "started":
        record.prompt_tokens = event.started.prompt_tokens
    elif kind == "finish":
        finish = event.finish
        record.finish = _REASONS.get(finish.reason, "unspecified")
        record.prompt_tokens = finish.usage.prompt_tokens
        record.completion_tokens = finish.usage.completion_tokens
        record.cached_tokens = finish.usage.cached_tokens
    return False


def finished(record: Record, at: float) -> None:
    """The server said that it has finished; whether that is what was asked for, its reason tells."""
    if record.finish in ("stop", "length"):
        record.ended(at, OK)
    else:
        record.ended(at, FAILED, record.finish.upper(), f"the server ended it: {record.finish}")


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The machine's reason if there is one, and the message."""
    found = error_from_call(error)
    reason = getattr(found, "reason", "") or ""
    return f"{reason}: {error.details()}" if reason else error.details() or ""


def told(error: grpc.aio.AioRpcError) -> str:
    """STATUS: message, with the fields at fault when the server names them; one line."""
    fields = (f"{name}: {why}" for name, why in error_from_call(error).field_violations)
    return " ".join(f"{error.code().name}: {'; '.join([error.details() or '', *fields])}".split())


def _channel(server: ServerSettings) -> grpc.aio.Channel:
    options: list[tuple[str, int | str]] = [*channel_options()]
    if server.tls_ca is None:
        return grpc.aio.insecure_channel(server.target, options=options)
    tls = ChannelTls(server.tls_ca, server.tls_cert, server.tls_key, server.tls_name)
    try:
        return grpc.aio.secure_channel(server.target, tls.credentials(), options=[*options, *tls.options()])
    except TlsError as error:
        raise BenchError(str(error)) from None


async def _ready(channel: grpc.aio.Channel, target: str) -> None:
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise BenchError(f"UNAVAILABLE: nobody answers at {target}")
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


def _chosen(models: list[Any], asked: str) -> Any:
    names = sorted({model.name for model in models})
    wanted, _, version = asked.partition("@")
    found = [
        model
        for model in models
        if (not asked or model.name == wanted) and (not version or model.version == version)
    ]
    if not models:
        raise BenchError("the gateway has no model")
    if not found:
        raise BenchError(f"no model {asked}: there is {', '.join(names)}")
    if not asked and len(names) > 1:
        raise BenchError(f"there are several models, name one with --model: {', '.join(names)}")
    return found[0]
