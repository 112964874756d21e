"""The one interceptor of every server: who may call, what an exception becomes, what is counted and logged.

It wraps all four kinds of call the same way. A `StatusError` leaves as its status; any other exception
leaves as INTERNAL with an id, and its stack goes into the log once. Nothing leaves as UNKNOWN. Knows no
service.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import time
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Any, ClassVar, NoReturn, TypeAlias

import grpc

from weft import logs
from weft.limits import DEFAULT_LIMITS
from weft.rpc.auth import ANYBODY, Authenticator, Caller, check_method
from weft.rpc.errors import StatusError, internal_error, new_error_id, status_message, trailers

REQUEST_ID_KEY = "x-request-id"
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
_UNGATED_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

# Whose call is in progress.
current_caller: ContextVar[Caller] = ContextVar("weft_caller", default=ANYBODY)

# The library's mark for the end of a stream; its type stubs do not know it.
_EOF: Any = vars(grpc.aio)["EOF"]
# What HTTP/2 counts for a header beside its name and its value.
_HEADER_BYTES = 32
log = logs.get_logger("rpc")
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class RpcCounters:
    """Calls begun and ended, and how. When no call is in progress, `begun` equals `ended`."""

    # Every instance that is alive, for a test that checks the balance of all of them.
    instances: ClassVar[weakref.WeakSet[RpcCounters]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.by_code: Counter[str] = Counter()
        RpcCounters.instances.add(self)


class _Undecodable:
    """Stands for a request whose bytes are no message of its type."""


_UNDECODABLE = _Undecodable()


def _undecodable() -> StatusError:
    return StatusError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "request: not a valid message of its type",
        field_violations=[("request", "not a valid message of its type; strings must be UTF-8")],
    )


def guarded(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that never raises: the library would send what it says to the client, as UNKNOWN."""

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except Exception:
            return _UNDECODABLE

    return deserialize


def passing_bytes(serializer: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """A serializer that takes bytes as they are: a handler of a stream may have made them itself."""

    def serialize(message: Any) -> bytes:
        return message if type(message) is bytes or serializer is None else serializer(message)

    return serialize


def request_id_in(metadata: Any) -> str:
    """The client's x-request-id when it is well-formed, else a new one."""
    for key, value in metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


async def _decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _UNDECODABLE:
            raise _undecodable()
        yield request


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every call of a server.

    `authenticator` None lets everybody in; else a key calls only what it lists, if it has a list.
    `needs_named_methods` refuses a key without one: what an operator may do, no client's key does. `gate`
    says why calls other than health and reflection are refused right now, or None.
    """

    def __init__(
        self,
        *,
        authenticator: Authenticator | None = None,
        gate: Callable[[], StatusError | None] = lambda: None,
        needs_named_methods: bool = False,
        max_metadata_bytes: int = DEFAULT_LIMITS.max_metadata_bytes,
    ) -> None:
        self._authenticator = authenticator
        self._needs_named_methods = needs_named_methods
        self._gate = gate
        self._max_metadata_bytes = max_metadata_bytes
        self.counters = RpcCounters()

    async def intercept_service(  # type: ignore[override]  # None is how "no such method" is said
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Find the handler and wrap it. A call that may not be made gets a handler that refuses it."""
        method = handler_call_details.method
        caller = ANYBODY
        try:
            self._check_metadata(handler_call_details.invocation_metadata or ())
            # Before the lookup: a stranger does not learn which methods exist.
            if self._authenticator is not None and method not in OPEN_METHODS:
                caller = self._authenticator.authenticate(handler_call_details.invocation_metadata or ())
                check_method(caller, method, must_be_named=self._needs_named_methods)
            if not method.startswith(_UNGATED_PREFIXES) and (closed := self._gate()) is not None:
                raise closed
        except StatusError as refusal:
            return self._refuse(method, refusal)
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrap(method, handler, caller)

    def _check_metadata(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """The library holds a peer to the limit once it has acknowledged it, and one that never does to
        16 MiB.
        """
        size = sum(len(key) + len(value) + _HEADER_BYTES for key, value in metadata)
        if size > self._max_metadata_bytes:
            text = f"metadata has more than {self._max_metadata_bytes} bytes"
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, text, reason="METADATA_TOO_LARGE")

    def _refuse(self, method: str, refusal: StatusError) -> Handler:
        # Of the stream-stream kind: the only one that may end before it has read a message.
        async def refuse(requests: Any, context: Any) -> None:
            async with self._call(method, context, ANYBODY):
                raise refusal

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _wrap(self, method: str, handler: Any, caller: Caller) -> Handler:
        """The same method inside `_call`, streaming both ways whatever it was: the library leaves a call of
        another kind without any answer when its message is cut short. On the wire it is the same.
        """
        has_stream_in, has_stream_out = handler.request_streaming, handler.response_streaming
        behavior = (
            (handler.stream_stream if has_stream_out else handler.stream_unary)
            if has_stream_in
            else (handler.unary_stream if has_stream_out else handler.unary_unary)
        )
        if not (inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior)):
            raise TypeError(f"{method}: the handler must be async")
        is_generator = inspect.isasyncgenfunction(behavior)
        serialize = handler.response_serializer or bytes

        async def serve(requests: Any, context: Any) -> None:
            async with self._call(method, context, caller):
                request = _decoded(requests) if has_stream_in else await _only(context)
                if not has_stream_out:
                    # Serialized here, so that a response of the wrong type is an error like any other.
                    await context.write(serialize(await behavior(request, context)))
                    return
                if not is_generator:
                    await behavior(request, context)
                    return
                # Written from here rather than yielded: when the client is gone while a message waits to be
                # sent, the handler's own `finally` runs at once and not when its generator is collected.
                async with contextlib.aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)

        return grpc.stream_stream_rpc_method_handler(
            serve,
            request_deserializer=guarded(handler.request_deserializer)
            if handler.request_deserializer
            else None,
            response_serializer=passing_bytes(handler.response_serializer) if has_stream_out else None,
        )

    @contextlib.asynccontextmanager
    async def _call(self, method: str, context: Any, caller: Caller) -> AsyncIterator[None]:
        """Count, log and translate one call. Every way out passes the `finally`."""
        call_id = request_id_in(context.invocation_metadata())
        logs.request_id.set(call_id)
        current_caller.set(caller)
        self.counters.begun += 1
        started = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            context.set_trailing_metadata(((REQUEST_ID_KEY, call_id),))
            yield
        except StatusError as error:
            code = error.code
            await _abort(context, error, call_id)
        except asyncio.CancelledError:
            # Raised on: a handler that swallows it leaks memory inside the library.
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = grpc.StatusCode.ABORTED
            raise
        except Exception as error:
            if isinstance(error, grpc.aio.InternalError) or (
                isinstance(error, grpc.aio.BaseError) and (context.cancelled() or context.done())
            ):
                # The call was over before the handler wrote to it, or ended while it did, and nobody has
                # cancelled the handler yet. The first kind of error comes before the context knows.
                code = grpc.StatusCode.CANCELLED
                raise asyncio.CancelledError from None
            code = grpc.StatusCode.INTERNAL
            error_id = new_error_id()
            log.failure("unhandled exception", error, method=method, error_id=error_id)
            await _abort(context, internal_error(error_id), call_id)
        finally:
            self.counters.ended += 1
            self.counters.by_code[code.name] += 1
            log.debug(
                "call ended",
                method=method,
                code=code.name,
                key=caller.name,
                seconds=time.monotonic() - started,
            )


async def _only(context: Any) -> Any:
    """The one message of a call that does not stream requests."""
    request = await context.read()
    if request is _EOF:
        raise StatusError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "request: missing or cut short",
            field_violations=[("request", "missing or cut short")],
        )
    if request is _UNDECODABLE:
        raise _undecodable()
    return request


async def _abort(context: Any, error: StatusError, call_id: str) -> NoReturn:
    await context.abort(error.code, status_message(error), (*trailers(error), (REQUEST_ID_KEY, call_id)))
    raise AssertionError("abort returned")
