"""The HTTP endpoints as ASGI applications. A client that leaves cancels its request."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, ClassVar

from services.gateway.gateway import Gateway
from services.gateway.http.answers import AnswerWriter
from services.gateway.http.body import BODY_S, Disconnected, Receive, Scope, read_object
from services.gateway.http.errors import HttpError, body_of, encode, headers_of, status_of
from services.gateway.http.parameters import HttpRequest, parse_request
from services.gateway.http.rate_limits import rate_limit_headers
from services.gateway.streams.reader import Reader
from weft import logs
from weft.rpc.auth import ANYBODY, Authenticator, Caller, check_method
from weft.rpc.errors import StatusError, internal_error, new_error_id

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_JSON = [(b"content-type", b"application/json")]
_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
log = logs.get_logger("gateway.http")


class Endpoint:
    """Authenticates, answers, and turns every exception into an error body. Subclasses give `respond`, and
    the `method` that a key must be allowed.
    """

    method: ClassVar[str]

    def __init__(
        self, gateway: Gateway, authenticator: Authenticator | None, *, is_open: bool = False
    ) -> None:
        self.gateway = gateway
        self._authenticator = None if is_open else authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        out = Output(send)
        try:
            caller = ANYBODY
            if self._authenticator is not None:
                pairs = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
                caller = self._authenticator.authenticate(pairs)
                check_method(caller, self.method)
            await self.respond(scope, receive, out, caller)
        except Disconnected:
            return
        except (StatusError, HttpError) as error:
            await out.error(error)
        except Exception as error:
            error_id = new_error_id()
            log.failure("unhandled exception", error, path=scope["path"], error_id=error_id)
            await out.error(internal_error(error_id))

    async def respond(self, scope: Scope, receive: Receive, out: Output, caller: Caller) -> None:
        """Answer through `out`. May raise StatusError, HttpError or Disconnected."""
        raise NotImplementedError


class Output:
    """What goes back. Remembers whether the answer has begun, since an error then has another form."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False

    async def whole(self, status: int, data: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """A whole answer."""
        headers = [*headers, (b"content-length", str(len(data)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": data})

    async def begin_stream(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin a stream of events."""
        await self._send({"type": "http.response.start", "status": 200, "headers": [*_SSE, *headers]})
        self._is_stream = True

    async def events(self, documents: list[dict[str, Any]]) -> None:
        """Send events: one write, whatever their number."""
        if documents:
            data = b"".join(b"data: " + encode(document) + b"\n\n" for document in documents)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, last: bytes) -> None:
        """Send the last bytes of a stream."""
        await self._send({"type": "http.response.body", "body": last})

    async def error(self, error: StatusError | HttpError) -> None:
        """An error body; inside a stream an event, and no [DONE]: what came so far is not the whole."""
        if self._is_stream:
            await self.end_stream(b"data: " + encode(body_of(error)) + b"\n\n")
        else:
            await self.whole(status_of(error), encode(body_of(error)), headers_of(error))


class Completions(Endpoint):
    """POST /v1/completions and /v1/chat/completions."""

    method = "Generate"

    def __init__(
        self,
        gateway: Gateway,
        authenticator: Authenticator | None,
        *,
        is_chat: bool,
        body_s: float = BODY_S,
    ) -> None:
        super().__init__(gateway, authenticator)
        self._is_chat = is_chat
        self._body_s = body_s

    async def respond(self, scope: Scope, receive: Receive, out: Output, caller: Caller) -> None:
        """Generate, while watching for the client's leave."""
        limits = self.gateway.limits
        document = await read_object(scope, receive, body_s=self._body_s, max_bytes=limits.max_body_bytes)
        request = parse_request(document, is_chat=self._is_chat, limits=limits)
        work = asyncio.create_task(self._generate(request, out, caller))
        watch = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Disconnected
            work.result()
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _generate(self, request: HttpRequest, out: Output, caller: Caller) -> None:
        request_id = request.common.request_id or uuid.uuid4().hex
        headers = [(b"x-request-id", request_id.encode("ascii", "replace"))]
        async with contextlib.AsyncExitStack() as stack:
            lives: list[Reader] = []
            for index in range(request.num_prompts):
                generate = request.generate(index)
                generate.request_id = request_id if request.num_prompts == 1 else f"{request_id}-{index}"
                opened = self.gateway.open(generate, caller=caller, budget_s=None)
                lives.append(await stack.enter_async_context(opened))
            states = self.gateway.admission.quotas.states(caller, self.gateway.admission.now())
            headers += rate_limit_headers(states)
            for live in lives:
                await live.admitted()
            writer = AnswerWriter(request, request_id, [live.resolved for live in lives])
            if request.is_stream:
                await self._stream(lives, writer, out, headers)
                return
            await _all([_gather(index, live, writer) for index, live in enumerate(lives)])
        await out.whole(200, encode(writer.whole()), [*_JSON, *headers])

    @staticmethod
    async def _stream(
        lives: list[Reader], writer: AnswerWriter, out: Output, headers: list[tuple[bytes, bytes]]
    ) -> None:
        async def send(index: int, live: Reader) -> None:
            while (updates := await live.next_updates()) is not None:
                await out.events(writer.chunks(index, updates))

        await out.begin_stream(headers)
        await out.events(writer.first_chunks())
        await _all([send(index, live) for index, live in enumerate(lives)])
        usage = writer.usage_chunk()
        await out.events([usage] if usage is not None else [])
        await out.end_stream(b"data: [DONE]\n\n")


async def _gather(index: int, live: Reader, writer: AnswerWriter) -> None:
    while (updates := await live.next_updates()) is not None:
        writer.add(index, updates)


async def _all(works: list[Coroutine[Any, Any, None]]) -> None:
    """Run all of `works` to their end. The first error ends the others and is raised."""
    if len(works) == 1:
        return await works[0]
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Models(Endpoint):
    """GET /v1/models and /v1/models/NAME."""

    method = "ListModels"

    async def respond(self, scope: Scope, receive: Receive, out: Output, caller: Caller) -> None:
        """List the models, or describe one."""
        models = {
            name: {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "weft",
                "max_model_len": served.info.max_model_len,
            }
            for name, served in sorted(self.gateway.router.by_model().items())
            if caller.may_use(served.name, served.version)
        }
        name = scope.get("path_params", {}).get("name")
        if name is None:
            document: dict[str, Any] = {"object": "list", "data": list(models.values())}
        elif name in models:
            document = models[name]
        else:
            raise HttpError(404, f"model {name[:80]!r} is not served here", code="model_not_found")
        await out.whole(200, encode(document), _JSON)


class Health(Endpoint):
    """GET /healthz: 200 when a request could be served now, else 503."""

    method = "Check"

    async def respond(self, scope: Scope, receive: Receive, out: Output, caller: Caller) -> None:
        """Say whether the gateway is ready."""
        is_ready = self.gateway.router.is_ready and not self.gateway.is_draining
        document = {
            "status": "ok" if is_ready else "not ready",
            "engines_up": sum(link.is_up for link in self.gateway.router.links),
            "engines_tripped": sum(
                not link.breaker.allows(self.gateway.now()) for link in self.gateway.router.links
            ),
        }
        headers = _JSON if is_ready else [*_JSON, (b"retry-after", b"1")]
        await out.whole(200 if is_ready else 503, encode(document), headers)


class Metrics(Endpoint):
    """GET /metrics: of every model and every key, so a key of some models must name the method."""

    method = "Metrics"

    def __init__(
        self, gateway: Gateway, authenticator: Authenticator | None, text: Callable[[], bytes], kind: str
    ) -> None:
        super().__init__(gateway, authenticator)
        self._text = text
        self._kind = kind

    async def respond(self, scope: Scope, receive: Receive, out: Output, caller: Caller) -> None:
        """The exposition."""
        check_method(caller, self.method, must_be_named=caller.models is not None)
        await out.whole(200, self._text(), [(b"content-type", self._kind.encode())])
