"""A mock engine and a gateway as processes, and so much asked of them that every metric has a sample."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from weft.v1 import gateway_service_pb2 as gateway_pb
from weft.v1 import generation_pb2 as pb
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
TIMEOUT_S = 60.0


class Process:
    """One service: its log, an event a line, and its end."""

    def __init__(self, module: str, *flags: object) -> None:
        command = [sys.executable, "-m", module, "serve", *map(str, flags)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if line.startswith("{"):
                self._events.put(json.loads(line))

    def wait_for(self, name: str) -> dict[str, Any]:
        """The next event of a name. queue.Empty when it does not come."""
        while True:
            event = self._events.get(timeout=TIMEOUT_S)
            if event["event"] == name:
                return event

    def terminate(self, timeout_s: float) -> int:
        """Ask it to end, as the kubelet does, and return its exit code. TimeoutExpired when it does not."""
        self._process.terminate()
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """End it at once, and wait for that."""
        self._process.kill()
        self._process.wait()
        self._reader.join(5)


@dataclass
class Running:
    """Where things listen, and what was scraped when all had been asked for."""

    engine: Process
    engine_grpc: str
    engine_metrics: str
    gateway_grpc: str
    gateway_http: str

    def scrape(self) -> dict[str, str]:
        """The /metrics texts now, by service, as Prometheus asks for them."""
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
        pages = {}
        for service, address in (("engine", self.engine_metrics), ("gateway", self.gateway_http)):
            asked = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
            with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as response:
                pages[service] = response.read().decode()
        return pages


@contextlib.contextmanager
def started() -> Iterator[Running]:
    """An engine with a batch of two, and a gateway in front with a short queue."""
    with contextlib.ExitStack() as stack:
        flags = ["--metrics", "127.0.0.1:0", "--max-batch-size", 2, "--num-blocks", 64, "--step-ms", 3]
        engine = Process("tools.mock_engine", *flags)
        stack.callback(engine.kill)
        metrics = engine.wait_for("metrics")["address"]
        target = engine.wait_for("serving")["address"]
        flags = ["--tokenizer", DEMO, "--engine", target, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        gateway = Process("services.gateway", *flags, "--max-waiting-requests", 8)
        stack.callback(gateway.kill)
        http = gateway.wait_for("http")["address"]
        yield Running(engine, target, metrics, gateway.wait_for("serving")["address"], http)


def request(seed: int = 1, **fields: Any) -> gateway_pb.GenerateRequest:
    """A request of 60 tokens."""
    sampling = pb.SamplingParams(max_tokens=fields.pop("max_tokens", 60), ignore_eos=True, seed=seed)
    return gateway_pb.GenerateRequest(text="Once upon a time", sampling=sampling, **fields)


def use(running: Running, num_requests: int = 24) -> dict[str, int]:
    """More requests at once than there is room for, a resumed one and a session's. Status codes, counted."""
    codes: dict[str, int] = {}

    def ask(seed: int) -> str:
        try:
            for _ in stub.Generate(request(seed), timeout=TIMEOUT_S):
                pass
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    with grpc.insecure_channel(running.gateway_grpc) as channel:
        stub = GatewayServiceStub(channel)
        with ThreadPoolExecutor(num_requests) as pool:
            for code in pool.map(ask, range(num_requests)):
                codes[code] = codes.get(code, 0) + 1
        for _ in range(2):  # the second takes up what the first began
            for _ in stub.Generate(request(request_id="again", resumable=True), timeout=TIMEOUT_S):
                pass
    return codes


Families = dict[str, tuple[str, set[str], str]]


def families_of(text: str) -> Families:
    """Of each metric in a page: type, labels (`le` not among them), help. By the name that its samples carry;
    a histogram's own, without a suffix.
    """
    found: Families = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels, family.documentation)
    return found
