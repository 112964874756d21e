"""Logs of running processes: no client can forge a line, and nothing of a prompt or an answer is in them."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import pytest

from services.gateway.text.tokenization import TokenizationError
from tests.services.gateway.guard_process import DEMO, ROOT, GuardProcess
from weft import logs
from weft.rpc.address import parse_address
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

FORGED = '{"time":"x","level":"error","logger":"gateway","event":"forged"}'
HOSTILE = [
    f"a\r\n{FORGED}\r\n",
    f'"}}\n{FORGED}\n{{"',
    f"\x1b[2K\x1b[1A{FORGED}",
    f"\u2028{FORGED}\u2029\x85\x0b\x0c{FORGED}",
    "\u202e\ufeff\x00\x07\x7f" + FORGED,
    '\\"\\\\u000a' + FORGED,
    "%s %(event)s {event} %n" + FORGED,
    ("x" * 1023 + "\n") * 1024,
]
CANARY = "canaryqzx"


@pytest.fixture
async def running() -> AsyncIterator[tuple[GuardProcess, str, str]]:
    """A gateway with an engine, both at debug level; the address of gRPC, and of HTTP."""
    processes = []
    try:
        engine = await GuardProcess.start("tools.mock_engine", "--step-ms", 0, "--log-level", "debug")
        processes.append(engine)
        engine_address = (await engine.wait_for("serving"))["address"]
        gateway = await GuardProcess.start(
            "services.gateway",
            *("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log-level", "debug"),
            *("--engine", engine_address, "--tokenizer", DEMO),
        )
        processes.append(gateway)
        address = (await gateway.wait_for("listening"))["address"]
        http = (await gateway.wait_for("http"))["address"]
        await gateway.wait_for("serving")
        gateway.engine = engine  # type: ignore[attr-defined]
        yield gateway, address, http
    finally:
        for process in reversed(processes):
            await process.end()


async def attempt(call: Any) -> str:
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
        return error.code().name if isinstance(error, grpc.aio.AioRpcError) else "CLIENT"
    return "OK"


def generate(**fields: Any) -> pb.GenerateRequest:
    if not {"chat", "token_ids"} & set(fields):
        fields.setdefault("text", "x")
    return pb.GenerateRequest(sampling=gen.SamplingParams(max_tokens=3, seed=1), **fields)


def chat(role: str = "user", content: str = "x") -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content=content)])


async def send_over_grpc(address: str, text: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GatewayServiceStub(channel)
        for fields in (
            {"request_id": text},
            {"model": text},
            {"session_id": text},
            {"resume_token": text},
            {"cache_salt": text},
            {"stop": [text]},
            {"chat": chat(role=text)},
            {"chat": chat(content=text)},
            {"text": text},
        ):
            await attempt(stub.Generate(generate(**fields), timeout=60))
        await attempt(stub.Cancel(pb.CancelRequest(request_id=text), timeout=60))
        await attempt(stub.Tokenize(pb.TokenizeRequest(model=text, text=text), timeout=60))
        await attempt(stub.GetSession(pb.GetSessionRequest(session_id=text), timeout=60))
        await attempt(stub.CreateSession(pb.CreateSessionRequest(model=text, session_id=text), timeout=60))
        short = "".join(c if 32 <= ord(c) < 127 else "?" for c in text)[:500]
        for key in ("x-request-id", "authorization", "traceparent", "user-agent", "x-other"):
            await attempt(stub.ListModels(pb.ListModelsRequest(), metadata=[(key, short)], timeout=60))
        await attempt(
            stub.ListModels(
                pb.ListModelsRequest(), metadata=[("x-other-bin", text.encode()[:500])], timeout=60
            )
        )
        for method in (f"/weft.v1.GatewayService/{short[:200]}", f"/{short[:200]}/Generate"):
            await attempt(channel.unary_unary(method)(b"", timeout=60))
        # Bytes that are no UTF-8, in a string field.
        for method in ("Generate", "Tokenize", "Cancel"):
            data = b"\x0a\x04\xff\xfe\x0a\x1b" + text.encode()[:100]
            await attempt(channel.unary_unary(f"/weft.v1.GatewayService/{method}")(data, timeout=60))


async def send_over_http(address: str, text: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as client:
        user = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        for body in (
            {**user, "model": text},
            {**user, "request_id": text},
            {**user, "user": text},
            {**user, text: 1},
            {**user, "messages": [{"role": text, "content": text}]},
            {**user, "metadata": {text: text}},
            {**user, "stop": text},
        ):
            await client.post("/v1/chat/completions", json=body)
        for path in ("/v1/models/", "/", "/v1/completions/"):
            await client.get(path + quote(text[:1000], safe=""))
    host, _, port = address.rpartition(":")
    for data in (
        b"GET /" + text.encode()[:2000] + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + text.encode()[:2000] + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: "
        + text.encode()[:2000]
        + b"\r\n\r\n\xff",
        text.encode()[:3000],
        b"\xff\xfe\n" + FORGED.encode() + b"\n",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(data)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 20)
        except (ConnectionError, TimeoutError):
            pass
        finally:
            writer.close()


def check_lines(lines: list[bytes]) -> None:
    assert lines
    for line in lines:
        assert line.endswith(b"\n")
        assert len(line) < 300_000
        assert all(32 <= byte < 127 for byte in line[:-1]), line[:300]
        event = json.loads(line)
        assert event["event"] != "forged", line[:300]
        assert event["level"] in logs.LEVELS
        assert set(event) >= {"time", "level", "logger", "event"}


async def test_no_client_forges_a_line(running: tuple[GuardProcess, str, str]) -> None:
    gateway, address, http = running
    for text in HOSTILE:
        await send_over_grpc(address, text)
        await send_over_http(http, text)
    assert gateway.process.returncode is None
    async with grpc.aio.insecure_channel(address) as channel:
        assert await attempt(GatewayServiceStub(channel).Generate(generate(), timeout=60)) == "OK"
    engine = gateway.engine  # type: ignore[attr-defined]
    for process in (gateway, engine):
        await process.end()
        check_lines(process.lines)
    ended = [json.loads(line) for line in gateway.lines if b'"call ended"' in line]
    assert len(ended) > 50, "debug level shows calls"


async def prompt_in_every_way(address: str, http: str) -> set[str]:
    """The canary in every place that is a prompt's or an answer's, with success and with failure."""
    found = set()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GatewayServiceStub(channel)
        long = f"{CANARY} " * 20_000
        for request in (
            generate(text=CANARY),
            generate(chat=chat(content=CANARY)),
            generate(chat=chat(role=CANARY)),
            generate(text=CANARY, stop=[CANARY]),
            generate(text=CANARY, stop=[CANARY * 100]),
            generate(text=CANARY, cache_salt=CANARY),
            generate(text=CANARY, model="no-such"),
            generate(text=CANARY, session_id="no-such"),
            generate(text=long),
            generate(text=CANARY, resume_token="none"),
        ):
            found.add(await attempt(stub.Generate(request, timeout=60)))
        found.add(await attempt(stub.Generate(generate(text=CANARY), timeout=1e-4)))
        found.add(await attempt(stub.Tokenize(pb.TokenizeRequest(text=CANARY), timeout=60)))
        call = stub.Generate(
            pb.GenerateRequest(text=CANARY, sampling=gen.SamplingParams(max_tokens=5000, ignore_eos=True))
        )
        await call.read()
        call.cancel()
        multiplex = stub.Multiplex()
        await multiplex.write(pb.MultiplexRequest(stream_id=1, generate=generate(text=CANARY)))
        await multiplex.write(pb.MultiplexRequest(stream_id=2, generate=generate(chat=chat(role=CANARY))))
        await multiplex.done_writing()
        found.add(await attempt(multiplex))
    async with httpx.AsyncClient(base_url=f"http://{http}", timeout=60) as client:
        for body in (
            {"prompt": CANARY, "max_tokens": 2},
            {"prompt": [CANARY, CANARY], "max_tokens": 2},
            {"prompt": {"x": CANARY}},
            {"prompt": CANARY, "max_tokens": CANARY},
            {"prompt": CANARY, "stop": [CANARY, 5]},
            {"prompt": CANARY, "n": 1000},
        ):
            found.add(str((await client.post("/v1/completions", json=body)).status_code))
        headers = {"content-type": "application/json"}
        for data in (f'{{"prompt": "{CANARY}', f'{{"prompt":"{CANARY}","prompt":"{CANARY}"}}', CANARY):
            answer = await client.post("/v1/completions", content=data.encode(), headers=headers)
            found.add(str(answer.status_code))
    return found


async def test_no_prompt_is_logged_by_a_process(running: tuple[GuardProcess, str, str]) -> None:
    gateway, address, http = running
    found = await prompt_in_every_way(address, http)
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "200", "400"} <= found
    engine = gateway.engine  # type: ignore[attr-defined]
    engine.process.kill()  # in the middle: requests wait for it, and are told so
    async with grpc.aio.insecure_channel(address) as channel:
        call = GatewayServiceStub(channel).Generate(generate(text=CANARY), timeout=2)
        assert await attempt(call) in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    for process in (gateway, engine):
        await process.end()
        assert process.lines
        assert CANARY.encode() not in b"".join(process.lines)


@pytest.fixture
def records() -> Iterator[Any]:
    """What the process would write at debug level, as a gateway formats it."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(logs.json_line(record, is_private=True))

    handler, root, ours = Keep(), logging.getLogger(), logging.getLogger("weft")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    yield lines
    root.removeHandler(handler)
    ours.setLevel(level)


FAULTS = [ValueError, KeyError, TokenizationError, UnicodeError, LookupError, Exception]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_that_quotes_the_prompt_is_logged_without_it(
    fault: type[Exception], gateway: Any, records: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What breaks inside often says what on."""
    assets = gateway.link.assets

    async def fail(text: str) -> list[int]:
        raise fault(f"cannot tokenize {text!r}")

    monkeypatch.setattr(type(assets.tokenizer), "encode_text", staticmethod(fail))
    call = gateway.stub.Generate(generate(text=CANARY), timeout=20)
    assert await attempt(call) == "INTERNAL"
    async with httpx.AsyncClient(base_url=gateway.http_url) as client:
        answer = await client.post("/v1/completions", json={"prompt": CANARY, "max_tokens": 2})
    assert answer.status_code == 500
    assert CANARY not in answer.text
    assert CANARY not in call_details(await call.details())
    output = "\n".join(records)
    assert "stack" in output
    assert "in fail" in output  # where it was is told
    assert CANARY not in output


def call_details(text: str | None) -> str:
    return text or ""


def test_logging_into_a_full_pipe_does_not_hold_the_loop() -> None:
    """Nobody reads the pipe: records are dropped and counted; the event loop goes on, and so does the end."""
    script = """
import asyncio, sys, time
from weft import logs

async def main():
    logs.start("debug")
    log = logs.get_logger("x")
    worst = 0.0
    for _ in range(300):
        for number in range(100):
            log.info("event", number=number, text="x" * 500)
        before = time.monotonic()
        await asyncio.sleep(0)
        worst = max(worst, time.monotonic() - before)
    _, dropped = logs.state()
    begun = time.monotonic()
    logs.stop()
    print(worst, dropped, time.monotonic() - begun)
    sys.stdout.flush()

asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        worst, dropped, stopping = map(float, process.stdout.readline().split())
        assert worst < 30  # a write that blocks would never end
        assert dropped > 15_000  # of 30,000, with a queue of 10,000 and 64 KiB of pipe
        assert stopping < 60
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


async def test_the_configuration_names_files_and_no_keys(engine: Any, tmp_path: Any) -> None:
    key = tmp_path / "engine-key"
    key.write_text("secretkey\n")
    gateway = await GuardProcess.start(
        "services.gateway",
        *("--listen", "127.0.0.1:0", "--engine", engine.address, "--tokenizer", DEMO),
        *("--engine-api-key-file", key, "--log-level", "debug"),
    )
    await gateway.wait_for("serving")
    await gateway.end()
    assert str(parse_address("127.0.0.1:0")).encode() in b"".join(gateway.lines)
    assert b"secretkey" not in b"".join(gateway.lines)
