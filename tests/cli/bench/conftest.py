"""Servers for the load tool: one that sends tokens at known times, in a thread, and the real gateway before
the mock engine, as processes. Knows how to run the tool and read what it wrote.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from benchmarks.bench_server import TimedServer
from cli.__main__ import app
from cli.demo.processes import Service, command_of

READY_S = 120.0
_FLAGS = {
    "grpc": "--server {grpc}",
    "multiplex": "--server {grpc} --multiplex",
    "http": "--url http://{http}",
    "chat": "--url http://{http}/v1 --endpoint chat",
}


@dataclass(frozen=True)
class Ran:
    """One run of the tool."""

    result: Result
    document: dict[str, Any]

    @property
    def point(self) -> dict[str, Any]:
        """Its only point."""
        (point,) = self.document["points"]
        found: dict[str, Any] = point
        return found


Bench = Callable[..., Ran]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Run `weft bench`; flags as one text or several values. The document is empty when none was written."""

    def run(flags: str, *more: object) -> Ran:
        path = tmp_path / "result.json"
        path.unlink(missing_ok=True)
        arguments = ["bench", *flags.split(), *map(str, more), "--json", str(path)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=True)
        document = json.loads(path.read_text()) if path.exists() else {}
        return Ran(result, document)

    return run


@contextmanager
def in_thread(server: TimedServer) -> Iterator[TimedServer]:
    """Serve on an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


@pytest.fixture
def timed() -> Iterator[TimedServer]:
    """Quick: a token each millisecond."""
    with in_thread(TimedServer(first_s=0.002, gap_s=0.001)) as server:
        yield server


def where(protocol: str, server: TimedServer) -> str:
    return _FLAGS[protocol].format(grpc=server.grpc_address, http=server.http_address)


@dataclass(frozen=True)
class Addresses:
    """Of a gateway."""

    grpc: str
    http: str


@pytest.fixture(scope="session")
def weft_gateway(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Addresses]:
    """The real gateway before the mock engine."""
    pytest.importorskip("tokenizers")
    logs = tmp_path_factory.mktemp("bench-logs")
    command = [sys.executable, "-m", "tools.mock_engine", "serve", "--listen", "127.0.0.1:0"]
    engine = Service("engine", [*command, "--step-ms", "2"], logs)
    gateway = None
    try:
        address = engine.wait_for("serving", READY_S)["address"]
        flags = ["serve", "--engine", address, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        more = ["--tokenizer", str(root / "models/demo"), "--engine-dead-seconds", "10"]
        gateway = Service("gateway", command_of("gateway", [*flags, *more]), logs)
        grpc_address = gateway.wait_for("serving", READY_S)["address"]
        yield Addresses(grpc_address, gateway.wait_for("http", READY_S)["address"])
    finally:
        for service in (gateway, engine):
            if service is not None:
                service.kill()
