"""A gateway process and engine processes, each engine behind a proxy that can break its network.

Knows how processes are started, hurt and counted up. Does not know what clients ask or when a fault comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import grpc

from cli.demo.processes import Service, ServiceError, command_of
from tools.chaos.proxy import Proxy
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

READY_S = 180.0
CALL_S = 10.0
IDLE_S = 15.0
POLL_S = 0.1
LOCAL = [("grpc.use_local_subchannel_pool", 1)]


def mock_command(*flags: object) -> list[str]:
    """The command line of a mock engine."""
    return [sys.executable, "-m", "tools.mock_engine", "serve", "--listen", "127.0.0.1:0", *map(str, flags)]


class Engine:
    """One engine: its process of the moment and the proxy that the gateway knows it by. A process that was
    started again listens elsewhere; the proxy stays where it is.
    """

    def __init__(self, name: str, command: Sequence[str], logs: Path) -> None:
        self.name = name
        self.proxy = Proxy("127.0.0.1:1")
        self._command = list(command)
        self._logs = logs
        self.services: list[Service] = []
        self.address = ""

    @property
    def service(self) -> Service:
        """The newest process. Raises ServiceError before the first start."""
        if not self.services:
            raise ServiceError(f"{self.name} was never started")
        return self.services[-1]

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return bool(self.services) and self.service.is_running

    async def start(self) -> None:
        """Start a process, and return once it serves behind the proxy. Raises ServiceError."""
        name = f"{self.name}-{len(self.services) + 1}"
        self.services.append(Service(name, self._command, self._logs))
        event = await asyncio.to_thread(self.service.wait_for, "serving", READY_S)
        self.address = event["address"]
        host, port = self.address.rsplit(":", 1)
        self.proxy.target = self.proxy.target._replace(host=host, port=int(port))
        if not self.proxy.address.port:
            await self.proxy.start()

    async def kill(self) -> None:
        """SIGKILL."""
        await asyncio.to_thread(self.service.kill)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal: SIGSTOP freezes, SIGCONT thaws, SIGTERM drains and ends, SIGUSR2 hangs a mock,
        SIGRTMIN breaks its device.
        """
        self.service.send_signal(number)

    async def wait_ended(self, timeout_s: float = 60.0) -> int:
        """Wait for the process to end by itself; its exit code. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while self.service.is_running:  # noqa: ASYNC110 - a process has no event to wait for
                await asyncio.sleep(POLL_S)
        return self.service.exit_code or 0

    async def drain(self, deadline_s: float) -> None:
        """The Drain call: nothing new is admitted, what is left after `deadline_s` is cut."""
        async with grpc.aio.insecure_channel(self.address, options=LOCAL) as channel:
            call = EngineServiceStub(channel).Drain(
                engine_pb.DrainRequest(deadline_ms=int(1000 * deadline_s)), timeout=deadline_s + CALL_S
            )
            try:
                async for _ in call:
                    pass
            finally:
                call.cancel()

    async def load(self) -> engine_pb.GetLoadResponse:
        """Its counters, asked past the proxy."""
        async with grpc.aio.insecure_channel(self.address, options=LOCAL) as channel:
            stub = EngineServiceStub(channel)
            return await stub.GetLoad(engine_pb.GetLoadRequest(), timeout=CALL_S)  # type: ignore[no-any-return]

    async def info(self) -> engine_pb.GetInfoResponse:
        """What it is, asked past the proxy."""
        async with grpc.aio.insecure_channel(self.address, options=LOCAL) as channel:
            stub = EngineServiceStub(channel)
            return await stub.GetInfo(engine_pb.GetInfoRequest(), timeout=CALL_S)  # type: ignore[no-any-return]

    async def problems_when_idle(self) -> list[str]:
        """What is not given back once nothing runs, after at most IDLE_S."""
        give_up_at = asyncio.get_running_loop().time() + IDLE_S
        while True:
            load = await self.load()
            left = load.running + load.waiting + load.paused + load.active_blocks
            if not left and load.requests_begun == load.requests_ended:
                break
            if asyncio.get_running_loop().time() > give_up_at:
                counts = f"{load.requests_begun} sequences begun, {load.requests_ended} ended"
                return [f"{self.name}: {counts}, {load.active_blocks} blocks active with nothing to do"]
            await asyncio.sleep(POLL_S)
        num_blocks = (await self.info()).num_blocks
        if load.free_blocks + load.cached_blocks != num_blocks:
            return [
                f"{self.name}: {load.free_blocks} free + {load.cached_blocks} cached of {num_blocks} blocks"
            ]
        return []


class Stack:
    """`async with Stack(...) as stack:` with everything serving. Leaving kills what still runs; `stop` ends
    it in order and tells what went wrong. `also` are addresses of more engines that the gateway is told of.
    """

    def __init__(
        self,
        engine_commands: Sequence[Sequence[str]],
        logs: Path,
        *,
        gateway_flags: Sequence[object] = (),
        also: Sequence[str] = (),
    ) -> None:
        self.engines = [
            Engine(f"engine{index}", command, logs) for index, command in enumerate(engine_commands)
        ]
        self.target = ""
        self.http = ""
        self._logs = logs
        self._also = list(also)
        self._gateway_flags = [str(flag) for flag in gateway_flags]
        self._gateway: Service | None = None

    @property
    def gateway(self) -> Service:
        """The gateway's process. Raises ServiceError before the start."""
        if self._gateway is None:
            raise ServiceError("the gateway was never started")
        return self._gateway

    async def start(self) -> None:
        """Start the engines side by side, then the gateway. Raises ServiceError."""
        await asyncio.gather(*(engine.start() for engine in self.engines))
        addresses = ",".join([*(str(engine.proxy.address) for engine in self.engines), *self._also])
        flags = ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--engine", addresses]
        command = command_of("gateway", ["serve", *flags, *self._gateway_flags])
        self._gateway = Service("gateway", command, self._logs)
        self.target = (await asyncio.to_thread(self._gateway.wait_for, "serving", READY_S))["address"]
        self.http = (await asyncio.to_thread(self._gateway.wait_for, "http", READY_S))["address"]
        await self.wait_until_up(len(self.engines))

    async def wait_until_up(self, count: int) -> None:
        """Return once the gateway has links to so many engines. Raises TimeoutError."""
        async with asyncio.timeout(READY_S):
            while await self.metric("weft_gateway_engine_up") < count:  # noqa: ASYNC110 - a page, no event
                await asyncio.sleep(POLL_S)

    async def metrics(self) -> dict[str, float]:
        """The gateway's metrics: one by one with their labels, and one sum for each name."""
        page = await asyncio.to_thread(_fetch, f"http://{self.http}/metrics")
        sums: dict[str, float] = {}
        for line in page.splitlines():
            if line and not line.startswith("#"):
                labelled, value = line.rsplit(" ", 1)
                for name in {labelled, labelled.partition("{")[0]}:
                    sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    async def metric(self, name: str) -> float:
        """One of them; 0 when it is not there."""
        return (await self.metrics()).get(name, 0.0)

    async def problems_when_idle(self) -> list[str]:
        """Whatever is not balanced or not given back once no client is left."""
        problems: list[str] = []
        for engine in self.engines:
            if engine.is_running:
                problems += await engine.problems_when_idle()
        give_up_at = asyncio.get_running_loop().time() + IDLE_S
        while True:
            metrics = await self.metrics()
            begun = metrics.get("weft_gateway_requests_begun_total", 0.0)
            ended = metrics.get("weft_gateway_requests_ended_total", 0.0)
            slots = metrics.get("weft_gateway_engine_slots", 0.0)
            if begun == ended and not slots:
                return problems
            if asyncio.get_running_loop().time() > give_up_at:
                text = f"gateway: {begun:.0f} requests begun, {ended:.0f} ended, {slots:.0f} slots in use"
                return [*problems, text]
            await asyncio.sleep(POLL_S)

    async def stop(self) -> list[str]:
        """SIGTERM to all, the gateway first; what went wrong."""
        problems: list[str] = []
        for service in self._services():
            try:
                if service.is_running:
                    await asyncio.to_thread(service.stop)
            except ServiceError as error:
                problems.append(str(error))
        give_up_at = asyncio.get_running_loop().time() + IDLE_S
        for service in self._services():
            while service.is_any_left:
                if asyncio.get_running_loop().time() > give_up_at:
                    problems.append(f"{service.name} has left a process behind")
                    break
                await asyncio.sleep(POLL_S)
        return problems

    def _services(self) -> list[Service]:
        """Every process that was ever started."""
        gateway = [] if self._gateway is None else [self._gateway]
        return gateway + [service for engine in self.engines for service in engine.services]

    def tails(self) -> str:
        """The last log lines of every process."""
        engines = [engine.service for engine in self.engines if engine.services]
        return "\n".join(service.tail() for service in (self.gateway, *engines))

    async def __aenter__(self) -> Stack:
        try:
            await self.start()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._leave()

    async def _leave(self) -> None:
        for engine in self.engines:
            with contextlib.suppress(ServiceError):
                await engine.kill()
            await engine.proxy.stop()
        if self._gateway is not None:
            await asyncio.to_thread(self._gateway.kill)


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=CALL_S) as response:
        text: str = response.read().decode()
    return text
