"""No outbound connection but to engines: gateway and engine run as processes under a guard that sits below
Python and gRPC, in front of the C library, and are asked for everything that might make them call out.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.services.gateway.guard_process import DEMO, GuardProcess
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.engine_service_pb2_grpc import EngineServiceStub
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="the guard is made with a C compiler, for Linux",
)
HERE = Path(__file__).parent
# Nobody may call these; a port that nobody listens on, so that a call fails at once.
PROXY = "http://127.0.0.1:9"
URLS = [
    "http://169.254.169.254/latest/meta-data/",
    "https://example.com/x.png",
    "file:///etc/passwd",
    "ftp://127.0.0.1:1/x",
    "//example.com/x",
    "data:image/png;base64,AAAA",
    "grpc://example.com:1",
    "dns:///example.com",
    "unix:/tmp/x",
]


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "socket_guard.c"), "-ldl"],
        check=True,
    )
    return library


class Guarded:
    """What guarded processes did."""

    def __init__(self, library: Path, directory: Path) -> None:
        self.library = library
        self.directory = directory

    def environment(self, name: str) -> dict[str, str]:
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY"), PROXY)
        log = {"SOCKET_GUARD_LOG": str(self.directory / name), "LD_PRELOAD": str(self.library)}
        return {**os.environ, **proxies, **log}

    def calls(self, name: str) -> set[str]:
        """Everything noted. Unix sockets of name services are the C library's own business."""
        path = self.directory / name
        lines = path.read_text().splitlines() if path.exists() else []
        # gRPC reaches IPv4 through sockets of IPv6.
        lines = [re.sub(r"\[::ffff:([0-9.]+)\]", r"\1", line) for line in lines]
        return {line for line in lines if "unix:/var/run/nscd" not in line}


@pytest.fixture
def guarded(guard: Path, tmp_path: Path) -> Guarded:
    return Guarded(guard, tmp_path)


def test_the_guard_sees_what_there_is_to_see(guarded: Guarded) -> None:
    """Without this, a guard that sees nothing would pass for a server that calls nobody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        script = f"""
import socket, grpc, urllib.request
socket.create_connection(("127.0.0.1", {port})).close()
socket.getaddrinfo("localhost", 1)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))
try:
    channel = grpc.insecure_channel("127.0.0.1:7", options=[("grpc.enable_http_proxy", 0)])
    grpc.channel_ready_future(channel).result(timeout=2)
except grpc.FutureTimeoutError:
    pass
try:
    urllib.request.urlopen("http://example.invalid/", timeout=1)
except OSError:
    pass
"""
        environment = guarded.environment("control")
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    found = guarded.calls("control")
    expected = {f"connect 127.0.0.1:{port}", "lookup localhost", "send 127.0.0.1:9", "connect 127.0.0.1:7"}
    assert expected <= found
    assert "connect 127.0.0.1:9" in found, "the proxies that are set are used by those who look for them"


@pytest.fixture
async def started(guarded: Guarded) -> AsyncIterator[Any]:
    processes: list[GuardProcess] = []

    async def start(name: str, module: str, *flags: object) -> GuardProcess:
        running = await GuardProcess.start(module, *flags, environment=guarded.environment(name))
        processes.append(running)
        return running

    yield start
    for running in reversed(processes):
        await running.end()


async def ask(stub: GatewayServiceStub, request: pb.GenerateRequest, **call: Any) -> str:
    try:
        async for _ in stub.Generate(request, timeout=60, **call):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def text(prompt: str = "x", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=prompt, sampling=gen.SamplingParams(max_tokens=2, seed=1), **fields)


def chat(role: str = "user", content: str = "x") -> pb.GenerateRequest:
    prompt = pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content=content)])
    return pb.GenerateRequest(chat=prompt, sampling=gen.SamplingParams(max_tokens=2, seed=1))


def hostile_bodies(url: str) -> list[dict[str, Any]]:
    image = [{"type": "image_url", "image_url": {"url": url}}]
    ask_it = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    return [
        {**ask_it, "messages": [{"role": "user", "content": image}]},
        {**ask_it, "messages": [{"role": "user", "content": url}]},
        {**ask_it, "messages": [{"role": url, "content": "x"}]},
        {**ask_it, "model": url},
        {**ask_it, "chat_template": f"{{% include '{url}' %}}"},
        {**ask_it, "chat_template_kwargs": {"url": url}},
        {**ask_it, "tools": [{"type": "mcp", "server_url": url}]},
        {**ask_it, "metadata": {"callback": url}, "user": url},
        {**ask_it, "response_format": {"type": "json_schema", "json_schema": {"$ref": url}}},
    ]


async def be_hostile_over_http(client: httpx.AsyncClient) -> list[int]:
    statuses = []
    for url in URLS:
        answers = [await client.post("/v1/chat/completions", json=body) for body in hostile_bodies(url)]
        statuses += [answer.status_code for answer in answers]
        headers = {"host": "example.com", "x-forwarded-for": url, "referer": url, "origin": url}
        statuses.append((await client.get("/v1/models", headers=headers)).status_code)
        statuses.append((await client.get("/v1/models/" + url.replace("/", "%2F"))).status_code)
        statuses.append((await client.get("/metrics", params={"target": url})).status_code)
    return statuses


async def test_a_gateway_calls_its_engine_and_nobody_else(guarded: Guarded, started: Any) -> None:
    engine = await started("engine", "tools.mock_engine", "--step-ms", "0")
    engine_address = (await engine.wait_for("serving"))["address"]
    gateway = await started(
        "gateway",
        "services.gateway",
        *(
            "--listen",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
            "--engine",
            engine_address,
            "--tokenizer",
            DEMO,
        ),
    )
    address = (await gateway.wait_for("listening"))["address"]
    http = (await gateway.wait_for("http"))["address"]
    await gateway.wait_for("serving")
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GatewayServiceStub(channel)
        assert await ask(stub, text()) == "OK"
        assert await ask(stub, chat()) == "OK"
        for url in URLS:
            assert await ask(stub, text(url)) == "OK"
            assert await ask(stub, chat(content=f"![x]({url})")) == "OK"
            assert await ask(stub, chat(role=url)) == "INVALID_ARGUMENT"
            assert await ask(stub, text(model=url)) == "NOT_FOUND"
            assert await ask(stub, text(), metadata=[("x-callback", url), ("traceparent", url)]) == "OK"
    async with httpx.AsyncClient(base_url=f"http://{http}", trust_env=False, timeout=60) as client:
        statuses = await be_hostile_over_http(client)
        answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        assert answer.status_code == 200
    assert not [status for status in statuses if status >= 500], statuses
    assert await gateway.end() == 0
    assert guarded.calls("gateway") - {"lookup 127.0.0.1"} == {f"connect {engine_address}"}
    assert guarded.calls("engine") - {"lookup 127.0.0.1"} == set()


@pytest.mark.slow
async def test_an_engine_calls_nobody(guarded: Guarded, started: Any) -> None:
    """A real one, with the demo model."""
    pytest.importorskip("torch")
    engine = await started(
        "real",
        "services.engine",
        *("--listen", "127.0.0.1:0", "--source", DEMO, "--num-blocks", 64, "--threads", 1),
    )
    address = (await engine.wait_for("listening"))["address"]
    await engine.wait_for("serving", 120)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = EngineServiceStub(channel)
        for url in URLS:
            request = engine_pb.GenerateTokensRequest(
                prompt_token_ids=[300, 301], sampling=gen.SamplingParams(max_tokens=2), cache_salt=url
            )
            assert [response async for response in stub.GenerateTokens(request, timeout=60)]
        await stub.GetInfo(engine_pb.GetInfoRequest(), metadata=[("x-callback", URLS[0])])
    async with asyncio.timeout(60):
        assert await engine.end() == 0
    assert guarded.calls("real") - {"lookup 127.0.0.1"} == set()


@pytest.mark.parametrize("field", ["chat_template", "chat_template_kwargs", "continue_final_message"])
async def test_a_request_brings_no_template(field: str, gateway: Any) -> None:
    async with httpx.AsyncClient(base_url=gateway.http_url) as client:
        for value in ("{{ 7 * 7 }}", {"x": 1}, {}, "", True, ["x"]):
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, field: value}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400, value
            assert answer.json()["error"]["param"] == field
        answer = await client.post("/v1/chat/completions", json={**body, field: None})
        assert answer.status_code == 200
