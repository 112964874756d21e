"""A live stack for the clients: a gateway process in front of two mock engines, one of which may die."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from cli.demo.processes import Service, ServiceError, command_of
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "clients"
READY_S = 60.0


def run(*command, cwd=ROOT, timeout=60, **environment):
    """A client as a newcomer runs it."""
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


class LiveStack:
    """`target` is the gateway's address."""

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

    def kill_busy(self, among: int) -> None:
        """Kill an engine that works, once the two of them have `among` streams."""
        until = time.monotonic() + READY_S
        while sum(running := [self._running(address) for address in self.addresses]) < among:
            assert time.monotonic() < until, running
            time.sleep(0.02)
        self.engines[running.index(max(running))]._process.kill()

    @staticmethod
    def _running(address: str) -> int:
        with grpc.insecure_channel(address) as channel:
            load = EngineServiceStub(channel).GetLoad(engine_pb.GetLoadRequest(), timeout=10)
        return int(load.running)

    def stop(self) -> None:
        for service in reversed(self.services):
            if service.is_running:
                service.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    live = LiveStack(tmp_path_factory.mktemp("logs"))
    yield live
    live.stop()


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """The Node client with its dependencies, in a folder of its own: the checkout stays as it is."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    root = tmp_path_factory.mktemp("node")
    (root / "protos").symlink_to(ROOT / "protos")
    folder = root / "clients" / "node"
    folder.mkdir(parents=True)
    for path in (CLIENTS / "node").iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    command = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    try:
        done = run(*command, cwd=folder, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not answer")
    if done.returncode:
        pytest.skip(f"npm could not install: {done.stderr.strip().splitlines()[-1:]}")
    return folder
