"""A live stack for the clients: a gateway process in front of two mock engines, one of which may die."""

from __future__ import annotations

import sys
from pathlib import Path

import grpc
import pytest

from tools.demo.processes import Service, ServiceError, command_of
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60.0


class LiveStack:
    """`target` is the gateway's address. `kill_busy` kills the engine that works, without notice."""

    def __init__(self, logs: Path) -> None:
        flags = ["serve", "--listen", "127.0.0.1:0", "--tokenizer", str(ROOT / "models/demo")]
        mock = [sys.executable, "-m", "tools.mock_engine", *flags, "--step-ms", "8"]
        self.services = [Service(f"mock{i}", mock, logs) for i in range(2)]
        try:
            self._start(flags, logs)
        except ServiceError:
            self.stop()
            raise

    def _start(self, flags: list[str], logs: Path) -> None:
        self.engines = self.services[:2]
        self.addresses = [engine.wait_for("listening", READY_S)["address"] for engine in self.engines]
        for address in self.addresses:
            flags += ["--engine", address]
        self.services.append(Service("gateway", command_of("gateway", flags), logs))
        self.target = self.services[-1].wait_for("serving", READY_S)["address"]

    def kill_busy(self) -> None:
        for engine, address in zip(self.engines, self.addresses, strict=True):
            with grpc.insecure_channel(address) as channel:
                load = EngineServiceStub(channel).GetLoad(engine_pb.GetLoadRequest(), timeout=10)
            if load.running:
                engine._process.kill()
                return
        raise AssertionError("no engine works")

    def stop(self) -> None:
        for service in reversed(self.services):
            if service.is_running:
                service.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    live = LiveStack(tmp_path_factory.mktemp("logs"))
    yield live
    live.stop()
