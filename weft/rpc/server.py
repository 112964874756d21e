"""The life of a server: bind, load, then SERVING; at a signal NOT_SERVING, drain, then stop.

Ready means ready: while `load` runs, health says NOT_SERVING and calls are refused with UNAVAILABLE.
Loading before binding would hide a taken port behind minutes of work; SERVING before loading would draw
traffic to a server that cannot answer. Stopping before NOT_SERVING would break calls that a router was
still sending. Knows no service.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weft import logs
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.rpc.address import Address, why_not_bound
from weft.rpc.auth import Authenticator
from weft.rpc.call_loop import CallLoop
from weft.rpc.errors import StatusError
from weft.rpc.guard import Guard
from weft.rpc.health import HEALTH_SERVICE, HealthServicer
from weft.rpc.interceptor import Interceptor, RpcCounters
from weft.rpc.options import server_options
from weft.rpc.reload import watch
from weft.rpc.tls import ServerTls

STOP_GRACE_S = 2.0
LOADING_RETRY_S = 1.0

log = logs.get_logger("server")
T = TypeVar("T")


class BindError(Exception):
    """The address cannot be listened on. The message is one line for a person."""


class StoppedError(Exception):
    """Raised inside `load` when a signal came first."""


class Application(Protocol):
    """What a service gives to `serve`."""

    @property
    def service_names(self) -> Sequence[str]:
        """Full names of the services, for health and reflection."""

    async def load(self, server: Server) -> None:
        """Get ready and register the servicers on `server.grpc`. May take minutes; cancelled when a signal
        comes.
        """

    async def drain(self) -> None:
        """Stop taking new work and let what runs finish, within the service's own limit."""

    async def close(self) -> None:
        """Let everything go. Runs on every way out, `load` having failed included."""


@dataclass
class Server:
    """One gRPC server with health, reflection and the interceptor. `start` binds; the rest is order."""

    service_names: Sequence[str]
    is_public: bool = False
    authenticator: Authenticator | None = None
    tls: ServerTls | None = None
    limits: RequestLimits | None = None
    needs_named_methods: bool = False
    shares_port: bool = False
    address: Address = field(init=False)
    exit_code: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.health = HealthServicer(self.service_names)
        interceptor = Interceptor(
            authenticator=self.authenticator,
            gate=self._gate,
            needs_named_methods=self.needs_named_methods,
            max_metadata_bytes=(self.limits or DEFAULT_LIMITS).max_metadata_bytes,
        )
        self.counters: RpcCounters = interceptor.counters
        options = server_options(is_public=self.is_public, limits=self.limits, shares_port=self.shares_port)
        # Services are added when their load is done, after the start.
        self.grpc = CallLoop(self.service_names, [interceptor], options)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        names = (*self.service_names, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc)
        self._is_loaded = False
        self._stop = asyncio.Event()

    def _gate(self) -> StatusError | None:
        if self._is_loaded:
            return None
        return StatusError(
            grpc.StatusCode.UNAVAILABLE,
            "the server is loading",
            retry_after_s=LOADING_RETRY_S,
            reason="LOADING",
        )

    async def start(self, address: Address) -> None:
        """Bind and answer health checks with NOT_SERVING. Raises BindError."""
        # Tried by hand first: the library says only that it failed, in several lines on standard error.
        # Whoever shares a port has reserved it.
        reason = None if self.shares_port else why_not_bound(address)
        if reason is not None:
            raise BindError(f"cannot listen on {address}: {reason}")
        try:
            if self.tls is None:
                port = self.grpc.add_insecure_port(str(address))
            else:
                port = self.grpc.add_secure_port(str(address), self.tls.grpc_credentials())
        except RuntimeError:
            raise BindError(f"cannot listen on {address}") from None
        self.address = address._replace(port=port)
        await self.grpc.start()
        log.info("listening", address=str(self.address), tls=self.tls is not None)
        self._warn()

    def _warn(self) -> None:
        is_mutual = self.tls is not None and self.tls.is_mutual
        if self.address.is_loopback:
            return
        if self.authenticator is None and not is_mutual:
            log.warning("open to the network without API keys", address=str(self.address))
        elif self.authenticator is not None and self.tls is None:
            log.warning("API keys travel in plain text without TLS", address=str(self.address))

    def set_serving(self) -> None:
        """Open the gate and say so."""
        self._is_loaded = True
        self.health.set_serving(True)

    def set_not_serving(self) -> None:
        """Health alone changes: calls still arrive, and the service decides about them."""
        self.health.set_serving(False)

    def request_stop(self, exit_code: int = 0) -> None:
        """Begin to stop, from the event loop. A non-zero code skips the drain: something is broken."""
        if exit_code and not self.exit_code:
            self.exit_code = exit_code
            self.set_not_serving()
        self._stop.set()

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stop.is_set()

    async def wait_for_stop(self) -> None:
        """Return once a stop is asked for."""
        await self._stop.wait()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Refuse new calls, give those in progress `grace_s`, cancel the rest."""
        self.set_not_serving()
        await self.grpc.stop(grace_s)


@contextlib.contextmanager
def _signals(server: Server) -> Any:
    """SIGTERM and SIGINT ask the server to stop; a second one ends the process at once with code 1."""
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if server.is_stopping:
            log.warning("second signal, exiting at once", signal=signal.Signals(number).name)
            logs.stop()
            os._exit(1)
        log.info("stopping", signal=signal.Signals(number).name)
        server.request_stop()

    # kill -USR1 prints every thread's stack: what a process that hangs is asked first.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def serve(
    application: Application,
    address: Address,
    *,
    is_public: bool = False,
    authenticator: Authenticator | None = None,
    guard: Guard | None = None,
    shares_port: bool = False,
) -> int:
    """Run a service until a signal, and return the exit code of the process. `guard` brings keys of its own.
    With `shares_port`, other processes may listen on the same port.

    0 after a signal and a drain; what `Server.request_stop` was given otherwise. Raises BindError, and
    whatever `application.load` raises.
    """
    guard = guard or Guard(authenticator)
    server = Server(
        application.service_names,
        is_public=is_public,
        authenticator=guard.authenticator,
        tls=guard.tls,
        limits=guard.limits,
        shares_port=shares_port,
    )
    with _signals(server):
        async with _beside(server, guard):
            return await _run(application, server, address)


@contextlib.asynccontextmanager
async def _beside(server: Server, guard: Guard) -> AsyncIterator[None]:
    """What lives as long as the server: its admin port, and the watch over its files."""
    tasks = [asyncio.create_task(watch(guard.watched, guard.reload_s))] if guard.watched else []
    admin: Server | None = None
    try:
        if guard.admin is not None:
            from weft.rpc.admin import admin_server

            admin = admin_server(server, guard)
            await admin.start(guard.admin)
            log.info("admin port", address=str(admin.address))
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if admin is not None:
            await admin.stop()


async def _run(application: Application, server: Server, address: Address) -> int:
    """From binding to the last log line."""
    try:
        await server.start(address)
        try:
            await _load(application, server)
        except StoppedError:
            log.info("stopped while loading")
            return server.exit_code
        server.set_serving()
        log.info("serving", address=str(server.address))
        await server.wait_for_stop()
        server.set_not_serving()
        if not server.exit_code:
            await application.drain()
        return server.exit_code
    finally:
        await server.stop()
        await application.close()
        log.info("stopped", code=server.exit_code, begun=server.counters.begun, ended=server.counters.ended)


async def _load(application: Application, server: Server) -> None:
    """Load, unless a stop is asked for first: then the load is cancelled and StoppedError raised."""
    load = asyncio.ensure_future(application.load(server))
    stop = asyncio.ensure_future(server.wait_for_stop())
    try:
        await asyncio.wait((load, stop), return_when=asyncio.FIRST_COMPLETED)
        if not load.done() or (server.is_stopping and load.cancelled()):
            raise StoppedError
        load.result()
    finally:
        for task in (load, stop):
            task.cancel()
        await asyncio.gather(load, stop, return_exceptions=True)


def in_daemon_thread(work: Callable[[], T], name: str) -> Awaitable[T]:
    """Run `work` in a thread of its own that does not keep the process alive: loads that cannot be
    interrupted.

    Await the result on the calling event loop. Cancelling the await leaves the thread running.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def deliver(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():
            set_outcome(outcome)

    def run() -> None:
        set_outcome: Callable[[Any], None]
        outcome: Any
        try:
            set_outcome, outcome = done.set_result, work()
        except BaseException as error:  # it belongs to whoever awaits the result, whatever it is
            set_outcome, outcome = done.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, set_outcome, outcome)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


def exit_process(code: int) -> None:
    """End the process with `code`, logs written. Does not wait for a load that still runs in a thread."""
    logs.stop()
    os._exit(code)
