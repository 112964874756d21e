"""Who carries a run out: this process, or several. Knows nothing of what is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from cli.bench.driver import Assignment, Driver, Outcome
from cli.bench.grpc_transport import GrpcTransport
from cli.bench.http_transport import HttpTransport
from cli.bench.multiplex_transport import MultiplexTransport
from cli.bench.settings import Settings
from cli.bench.transport import Facts, Transport
from cli.bench.workloads import Workload

_TRANSPORTS: dict[str, Callable[[Settings, int], Transport]] = {
    "grpc": GrpcTransport,
    "multiplex": MultiplexTransport,
    "http": HttpTransport,
}
OPEN_LOOP_CONCURRENCY = 256


def make_transport(settings: Settings, num_shares: int = 1) -> Transport:
    """The transport of one process. Raises SettingsError."""
    most = max(
        load.concurrency or settings.max_concurrency or OPEN_LOOP_CONCURRENCY for load in settings.loads
    )
    return _TRANSPORTS[settings.server.transport](settings, -(-most // num_shares))


class Crew(Protocol):
    """Runs assignments."""

    async def open(self, facts: Facts, workload: Workload) -> None:
        """Get ready. Raises BenchError."""

    async def run(self, assignment: Assignment) -> list[Outcome]:
        """Carry one out; one outcome a process. Raises BenchError."""

    def stop(self) -> None:
        """Cancel what runs, now and from now on; `run` then returns what there is."""

    def progress(self) -> tuple[int, int] | None:
        """Requests done and running, where that is known."""

    async def close(self) -> None:
        """Let go of everything."""


class Alone:
    """This process does it, over a transport that is open already."""

    def __init__(self, settings: Settings, transport: Transport) -> None:
        self._settings = settings
        self._transport = transport
        self._stop = asyncio.Event()
        self._driver: Driver | None = None
        self._workload: Workload | None = None

    async def open(self, facts: Facts, workload: Workload) -> None:
        """Nothing is missing but what to ask."""
        self._transport.use(facts)
        self._workload = workload

    async def run(self, assignment: Assignment) -> list[Outcome]:
        """Here."""
        if self._workload is None:
            raise RuntimeError("the crew is not open")
        self._driver = Driver(self._settings, self._workload, self._transport, assignment)
        return [await self._driver.run(self._stop)]

    def stop(self) -> None:
        """As soon as the loop comes to it."""
        self._stop.set()

    def progress(self) -> tuple[int, int] | None:
        """Of the run that goes on."""
        return None if self._driver is None else (self._driver.num_done, self._driver.num_running)

    async def close(self) -> None:
        """Whoever opened the transport closes it."""
