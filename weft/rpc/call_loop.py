"""The library's asyncio server, made to outlive a call whose path is not UTF-8.

The library decodes the path of a call in the one loop that takes calls in, and a path that cannot be decoded
ends that loop, and with it the server and everything on it: one packet from anybody, before any key is asked
for. The paths of methods that it was told of beforehand it never decodes. So it is told of every method, and
a call of any other is taken out of the loop here and answered under a name of ours. Knows no service.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # its stubs leave it out

# Stands for the path of every method that is not here: what was sent is never looked at.
UNKNOWN_METHOD = "/unknown"
# The parts of the library that are used here. Releases without them decode the path in the call's own task.
_CAN_BE_GUARDED = all(
    hasattr(cygrpc, name) for name in ("_MethodResolver", "_handle_rpc", "_schedule_rpc_coro")
) and hasattr(cygrpc.AioServer, "add_registered_method_handlers")


def _is_no_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding on")


# Metadata that is not UTF-8 the library logs as it is, with a stack, and a key may be among it.
logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_metadata)


class _Core(cygrpc.AioServer):
    """Takes in calls. Those that reach `_request_call` are of methods that it was not told of."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interceptors: Sequence[Any], options: Any) -> None:
        super().__init__(loop, None, (), tuple(interceptors), tuple(options), None)
        self._event_loop = loop
        self._around = tuple(interceptors)
        self._refusals: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> Any:
        """The library waits for this to return a call; it never does."""
        while True:
            state = await super()._request_call()
            nothing = cygrpc._MethodResolver([], {})
            work = cygrpc._handle_rpc(UNKNOWN_METHOD, nothing, self._around, state, self._event_loop, False)
            refusal = self._event_loop.create_task(
                cygrpc._schedule_rpc_coro(work, state, self._event_loop, UNKNOWN_METHOD)
            )
            self._refusals.add(refusal)
            refusal.add_done_callback(self._refusals.discard)


class CallLoop(grpc.aio._server.Server):  # type: ignore[name-defined]
    """A `grpc.aio` server. Services may be added when it has started, if `service_names` named them or their
    methods were added before.
    """

    def __init__(self, service_names: Iterable[str], interceptors: Sequence[Any], options: Any) -> None:
        if not _CAN_BE_GUARDED:
            super().__init__(None, (), tuple(interceptors), tuple(options), None, None)
        else:
            self._loop = asyncio.get_running_loop()
            self._server = _Core(self._loop, interceptors, options)
        self._paths = {path for name in service_names for path in _paths_of(name)}
        self._is_started = False

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """Note the methods' names; they themselves are found among the generic handlers, where the library
        also finds what is added after the start.
        """
        self._paths |= {f"/{service_name}/{method}" for method in method_handlers}

    async def start(self) -> None:
        """Take calls in from now on."""
        if _CAN_BE_GUARDED and not self._is_started:
            self._is_started = True
            self._server.add_registered_method_handlers(dict.fromkeys(sorted(self._paths)))
        await super().start()


def _paths_of(service_name: str) -> Iterable[str]:
    try:
        service = descriptor_pool.Default().FindServiceByName(service_name)
    except KeyError:  # one of hand-made handlers, which are added before the start
        return ()
    return (f"/{service_name}/{method.name}" for method in service.methods)
