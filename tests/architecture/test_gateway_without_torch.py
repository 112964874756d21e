"""The gateway imports, and starts, where torch and its friends cannot be imported."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import engine_service_pb2_grpc as engine_grpc
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import gateway_service_pb2_grpc as gateway_grpc

ROOT = Path(__file__).resolve().parents[2]

# Runs in a child: the finder refuses the names before any other finder is asked.
BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "triton", "safetensors", "transformers"}:
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Refuse())
"""

IMPORT_ALL = """
import importlib, pkgutil
import services.gateway
names = [m.name for m in pkgutil.walk_packages(services.gateway.__path__, "services.gateway.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""

SERVE = """
import runpy
sys.argv[0] = "services.gateway"
runpy.run_module("services.gateway", run_name="__main__", alter_sys=True)
"""


class SilentEngine(engine_grpc.EngineServiceServicer):
    """Says what it is and nothing more: enough for a gateway to get ready."""

    def __init__(self, info: engine_pb.GetInfoResponse) -> None:
        self.info = info

    def GetInfo(self, request: object, context: grpc.ServicerContext) -> engine_pb.GetInfoResponse:
        return self.info

    def Connect(self, requests: Iterator[object], context: Any) -> Iterator[engine_pb.ConnectResponse]:
        yield engine_pb.ConnectResponse(
            hello=engine_pb.EngineHello(protocol_version=1, epoch=1, info=self.info)
        )
        for _ in requests:
            pass


@pytest.fixture
def engine_address(demo_model: Path) -> Iterator[str]:
    digest = "sha256:" + hashlib.sha256((demo_model / "tokenizer.json").read_bytes()).hexdigest()
    info = engine_pb.GetInfoResponse(
        model_name="demo",
        tokenizer_digest=digest,
        vocab_size=4096,
        max_model_len=1024,
        eos_token_ids=[1],
        block_size=128,
        num_blocks=8,
        max_batch_size=8,
        max_batched_tokens=512,
        max_queue_size=8,
    )
    server = grpc.server(ThreadPoolExecutor(4))
    engine_grpc.add_EngineServiceServicer_to_server(SilentEngine(info), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def wait_for_event(process: subprocess.Popen[bytes], log: Path, name: str) -> dict[str, Any]:
    """The first log event of this name, within 30 s."""
    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at:
        text = log.read_text()
        events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        for event in events:
            if event["event"] == name:
                return dict(event)
        assert process.poll() is None, text
        time.sleep(0.05)
    raise AssertionError(f"no event {name!r} in:\n{log.read_text()}")


def run_blocked(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_block_blocks() -> None:
    result = run_blocked("import torch")
    assert result.returncode != 0
    assert "torch is blocked" in result.stderr


def test_every_gateway_module_imports() -> None:
    result = run_blocked(IMPORT_ALL)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 5


def test_it_serves_text(engine_address: str, demo_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    arguments = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--engine",
        engine_address,
        "--tokenizer",
        str(demo_model),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", BLOCK + SERVE, *arguments], cwd=ROOT, stdout=out, stderr=out
        )
    try:
        address = wait_for_event(process, log, "serving")["address"]
        with grpc.insecure_channel(address) as channel:
            stub = gateway_grpc.GatewayServiceStub(channel)
            chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Who is there?")])
            ids = stub.Tokenize(pb.TokenizeRequest(chat=chat), timeout=20).token_ids
            assert list(ids[:2]) == [0, 3], "begin of text, then the user's turn"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
