"""The whole of Weft as processes: an artifact made from the demo model, an engine, a gateway, clients."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import pytest

from cli.demo.processes import Service, command_of
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1.engine_service_pb2_grpc import EngineServiceStub
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[2]
READY_S = 120.0


def pytest_collection_modifyitems(items):
    """The first test's time holds a quantization and the start of a stack, minutes on a busy machine."""
    for item in items:
        if item.path.parent == ROOT / "tests" / "e2e":
            item.add_marker(pytest.mark.timeout(900))


def quantize(artifacts, *more):
    """Quantize the demo model with little calibration: fast, and real AWQ all the same."""
    arguments = ["--source", str(ROOT / "models/demo"), "--artifacts", str(artifacts), "--name", "demo"]
    arguments += [
        "--samples",
        "8",
        "--sequence-length",
        "128",
        "--evaluation-tokens",
        "2048",
        "--threads",
        "2",
    ]
    return subprocess.run(
        command_of("quantizer", ["run", *arguments, *more]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """An artifact store with one version of the demo model."""
    root = tmp_path_factory.mktemp("artifacts")
    done = quantize(root)
    assert done.returncode == 0, done.stderr
    return root


STACKS: list[Stack] = []


class Stack:
    """An engine and a gateway, and channels to both."""

    def __init__(self, artifacts, logs, *, engine_flags=(), gateway_flags=(), source=None):
        self.logs = logs
        if source is None:
            model, tokenizer = f"--artifacts {artifacts} --model demo", f"--artifacts {artifacts}"
        else:
            model, tokenizer = f"--source {source}", f"--tokenizer {source}"
        self.engine_flags = [*model.split(), "--threads", "1", *engine_flags]
        self.gateway_flags = [*tokenizer.split(), *gateway_flags]
        self.services = []
        try:
            self.engine = self.start_engine("127.0.0.1:0")
            self.engine_address = self.engine.wait_for("listening", READY_S)["address"]
            self.gateway = self.start_gateway()
            self.engine.wait_for("serving", READY_S)
            self.connect_gateway()
        except BaseException:  # a test's time is up, too: nobody else knows what has been started
            self.kill()
            raise
        self.engine_channel = grpc.insecure_channel(self.engine_address)
        self.engine_client = EngineServiceStub(self.engine_channel)
        STACKS.append(self)

    def connect_gateway(self):
        """Wait until the gateway serves, and make a channel to it."""
        self.address = self.gateway.wait_for("serving", READY_S)["address"]
        self.channel = grpc.insecure_channel(self.address)
        self.client = GatewayServiceStub(self.channel)

    def start_engine(self, listen):
        flags = [*self.engine_flags, "--listen", listen, "--metrics", "127.0.0.1:0"]
        return self._start("engine", flags)

    def start_gateway(self):
        flags = f"--engine {self.engine_address} --listen 127.0.0.1:0 --http 127.0.0.1:0".split()
        flags += self.gateway_flags
        return self._start("gateway", flags)

    def _start(self, name, flags):
        self.services.append(Service(name, command_of(name, ["serve", *flags]), self.logs))
        return self.services[-1]

    def kill(self):
        """End whatever still runs."""
        for service in reversed(self.services):
            if service.is_running:
                service._process.kill()
                service._process.wait()

    @property
    def http(self):
        """The base address of the HTTP side."""
        return "http://" + self.gateway.wait_for("http", READY_S)["address"]

    def load(self):
        return self.engine_client.GetLoad(engine_pb.GetLoadRequest(), timeout=10)

    def wait_until_quiet(self, timeout_s=15.0):
        """Wait until nothing is live, then check that nothing was lost."""
        deadline = time.monotonic() + timeout_s
        while True:
            load = self.load()
            if load.requests_begun == load.requests_ended and not load.active_blocks:
                break
            assert time.monotonic() < deadline, f"still live: {load}"
            time.sleep(0.05)
        info = self.engine_client.GetInfo(engine_pb.GetInfoRequest(), timeout=10)
        assert load.free_blocks + load.active_blocks + load.cached_blocks == info.num_blocks
        if self.gateway.is_running:
            begun, ended = (
                self.gateway_count(f"weft_gateway_requests_{what}_total") for what in ("begun", "ended")
            )
            assert begun == ended
        return load

    def gateway_count(self, name):
        """A counter of the gateway's metrics page, summed over its labels."""
        page = urllib.request.urlopen(self.http + "/metrics", timeout=10).read().decode()
        values = [line.rsplit(" ", 1)[1] for line in page.splitlines() if line.startswith(name)]
        assert values, name
        return sum(map(float, values))

    def close(self):
        self.channel.close()
        self.engine_channel.close()
        for service in (self.gateway, self.engine):
            if service.is_running:
                service.stop()


@pytest.fixture(scope="session")
def shared_stack(artifacts, tmp_path_factory):
    # Many tests share it, and none is about a lost link: on cores that others keep busy a second's silence is
    # no sign of death.
    stack = Stack(artifacts, tmp_path_factory.mktemp("logs"), gateway_flags=["--engine-dead-seconds", "10"])
    yield stack
    stack.close()


@pytest.fixture
def stack(shared_stack):
    """The shared stack."""
    return shared_stack


@pytest.fixture(autouse=True)
def requests_begun_equal_requests_ended():
    """After every test, on every stack that still stands: all requests have ended, no block is owned."""
    yield
    for standing in STACKS:
        if standing.engine.is_running and standing.gateway.is_running:
            standing.wait_until_quiet()


@pytest.fixture
def own_stack(artifacts, tmp_path):
    """Starts stacks that a test may break; whatever still runs is stopped afterwards."""
    stacks = []

    def start(**flags):
        stacks.append(Stack(artifacts, tmp_path / f"logs{len(stacks)}", **flags))
        return stacks[-1]

    yield start
    for stack in stacks:
        stack.kill()


@pytest.fixture(scope="session")
def python():
    """This interpreter."""
    return sys.executable
