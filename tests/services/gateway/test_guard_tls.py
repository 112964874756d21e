"""TLS from the client through the gateway to the engine, certificates on both sides, changed under load."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from typer.testing import CliRunner

from cli.__main__ import app
from tests.services.gateway.guard_process import DEMO, GuardProcess
from tests.weft.rpc.certificates import Authority, Pair
from tools.mock_engine import MockEngine
from tools.mock_engine.oracle import expected_tokens
from weft.rpc import options as channel_arguments
from weft.rpc.address import parse_address
from weft.rpc.channel import open_channel
from weft.rpc.tls import ChannelTls, ServerTls
from weft.v1 import admin_service_pb2 as admin_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.admin_service_pb2_grpc import AdminServiceStub
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

PROMPT = [300, 301, 302]


def request(num_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=gen.SamplingParams(max_tokens=num_tokens, seed=7, ignore_eos=True),
    )


async def tokens_of(call: Any) -> list[int]:
    found: list[int] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        found += response.delta.token_ids
    return found


def server_flags(pair: Pair, ca: Path) -> tuple[object, ...]:
    return ("--tls-cert", pair.cert, "--tls-key", pair.key, "--tls-client-ca", ca)


async def serial_of(address: str, context: ssl.SSLContext) -> int:
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    data = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(data).serial_number


def client_context(authority: Authority, pair: Pair | None, *, is_grpc: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    if is_grpc:
        context.set_alpn_protocols(["h2"])
    return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_from_end_to_end(authority: Authority, tmp_path: Path) -> None:
    inside = Authority(tmp_path, "inside")
    engine_pair, link_pair = inside.sign("engine"), inside.sign("link")
    pair, client = authority.sign("server"), authority.sign("client")
    processes = []
    try:
        engine = await GuardProcess.start(
            "tools.mock_engine", "--step-ms", 10, *server_flags(engine_pair, inside.ca)
        )
        processes.append(engine)
        engine_address = (await engine.wait_for("serving"))["address"]
        gateway = await GuardProcess.start(
            "services.gateway",
            *("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0"),
            *("--engine", engine_address, "--tokenizer", DEMO, "--tls-reload-seconds", 0.1),
            *("--engine-tls-ca", inside.ca, "--engine-tls-cert", link_pair.cert),
            *("--engine-tls-key", link_pair.key, *server_flags(pair, authority.ca)),
        )
        processes.append(gateway)
        admin = (await gateway.wait_for("admin port"))["address"]
        address = (await gateway.wait_for("listening"))["address"]
        http = (await gateway.wait_for("http"))["address"]
        await gateway.wait_for("serving")
        tls = ChannelTls(authority.ca, client.cert, client.key)
        async with open_channel(address, tls=tls) as channel:
            await serve_all(channel, authority, client, http)
            stream = GatewayServiceStub(channel).Generate(request(300), timeout=120)
            first = await stream.read()
            assert first.HasField("started")
            new = x509.load_pem_x509_certificate(authority.sign("server").cert.read_bytes()).serial_number
            async with asyncio.timeout(60):
                for where, is_grpc in ((address, True), (http, False)):
                    context = client_context(authority, client, is_grpc=is_grpc)
                    while await serial_of(where, context) != new:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            assert await tokens_of(stream) == expected_tokens(PROMPT, 7, 0, 300)
        await stop_by_admin(gateway, admin, tls)
    finally:
        for process in reversed(processes):
            await process.end()


async def serve_all(channel: grpc.aio.Channel, authority: Authority, client: Pair, http: str) -> None:
    stub = GatewayServiceStub(channel)
    assert await tokens_of(stub.Generate(request(5), timeout=60)) == expected_tokens(PROMPT, 7, 0, 5)
    body = {"prompt": PROMPT, "max_tokens": 2}
    for shown in (client, None):
        context = client_context(authority, shown)
        async with httpx.AsyncClient(base_url=f"https://{http}", verify=context) as https:
            if shown is None:
                with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                    await https.post("/v1/completions", json=body)
            else:
                assert (await https.post("/v1/completions", json=body)).status_code == 200
    async with httpx.AsyncClient(base_url=f"http://{http}") as plain:
        with pytest.raises(httpx.TransportError):
            await plain.post("/v1/completions", json=body)


async def stop_by_admin(gateway: GuardProcess, admin: str, tls: ChannelTls) -> None:
    async with open_channel(admin, tls=tls) as channel:
        stub = AdminServiceStub(channel)
        status = await stub.GetStatus(admin_pb.GetStatusRequest())
        assert list(status.services) == ["weft.v1.GatewayService"]
        assert [file.what for file in status.files] == ["certificates"]
        assert status.files[0].reloads >= 1
        await stub.StartDrain(admin_pb.StartDrainRequest())
    await gateway.wait_for("stopped")
    async with asyncio.timeout(20):
        assert await gateway.process.wait() == 0


async def refused(gateway: Any) -> str:
    """Why the link to the engine does not come up."""
    async with asyncio.timeout(20):
        while gateway.link.last_problem in ("", "not connected yet"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not gateway.link.is_up
    return str(gateway.link.last_problem)


async def test_engines_that_must_not_be_used(
    authority: Authority, tmp_path: Path, stack: Any, start_gateway: Any
) -> None:
    other = Authority(tmp_path, "other")
    pair, client, stranger = authority.sign("engine"), authority.sign("client"), other.sign("stranger")
    engine = MockEngine(step_ms=0.0, tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=authority.ca)
    await stack.enter_async_context(engine)
    plain = MockEngine(step_ms=0.0)
    await stack.enter_async_context(plain)
    shown = {"engine_tls_cert": client.cert, "engine_tls_key": client.key}
    for target, options in (
        (engine, {}),
        (engine, {"engine_tls_ca": authority.ca}),
        (engine, {"engine_tls_ca": other.ca, **shown}),
        (engine, {"engine_tls_ca": authority.ca, "engine_tls_name": "elsewhere", **shown}),
        (engine, {"engine_tls_ca": tmp_path / "missing", **shown}),
        (
            engine,
            {
                "engine_tls_ca": authority.ca,
                "engine_tls_cert": stranger.cert,
                "engine_tls_key": stranger.key,
            },
        ),
        (plain, {"engine_tls_ca": authority.ca}),
    ):
        gateway = await start_gateway(target, wait=False, **options)
        assert await refused(gateway), options
        gateway.load.cancel()
    name = {"engine_tls_name": "localhost"}
    gateway = await start_gateway(engine, engine_tls_ca=authority.ca, **shown, **name)
    assert gateway.link.is_up


async def test_a_link_takes_the_newest_certificate_when_it_connects_again(
    authority: Authority, tmp_path: Path, stack: Any, start_gateway: Any, settle: Any
) -> None:
    other = Authority(tmp_path, "other")
    pair, client = authority.sign("engine"), authority.sign("client")
    clients = tmp_path / "clients.pem"
    clients.write_bytes(authority.ca.read_bytes())
    engine = MockEngine(step_ms=0.0, tls_cert=pair.cert, tls_key=pair.key, tls_client_ca=clients)
    await stack.enter_async_context(engine)
    gateway = await start_gateway(
        engine, engine_tls_ca=authority.ca, engine_tls_cert=client.cert, engine_tls_key=client.key
    )
    await engine.kill()
    await settle(lambda: not gateway.link.is_up, 20)
    clients.write_bytes(other.ca.read_bytes())
    new = other.sign("client")  # the same files
    assert new.cert == client.cert
    await engine.start()
    await settle(lambda: gateway.link.is_up, 30)


async def test_http_over_tls_in_process(authority: Authority, engine: Any, start_gateway: Any) -> None:
    """Bytes that are no TLS, a handshake that never ends and clients that leave do no harm."""
    pair = authority.sign("server")
    gateway = await start_gateway(
        engine, tls=ServerTls(pair.cert, pair.key), http=parse_address("127.0.0.1:0")
    )
    address = gateway.application.http.address
    writers = []
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01",
        b"",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"\x00" * 5000,
    ):
        _, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(data)
        writers.append(writer)
    context = client_context(authority, None)
    async with httpx.AsyncClient(base_url=f"https://{address}", verify=context) as client:
        answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        assert answer.status_code == 200
    for writer in writers:
        writer.close()


async def test_a_handshake_that_does_not_come_is_not_waited_for(
    authority: Authority, engine: Any, start_gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio would wait for a minute and gRPC for two; such a connection has no other clock."""
    monkeypatch.setattr(channel_arguments, "HANDSHAKE_MS", 500)
    pair = authority.sign("server")
    gateway = await start_gateway(
        engine,
        tls=ServerTls(pair.cert, pair.key),
        http=parse_address("127.0.0.1:0"),
        http_header_seconds=0.5,
    )
    for address in (gateway.application.http.address, gateway.server.address):
        for data in (b"", b"\x16\x03\x01"):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(data)
            async with asyncio.timeout(30):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.close()


async def test_the_command_line(authority: Authority, engine: Any, start_gateway: Any) -> None:
    pair, client = authority.sign("server"), authority.sign("client")
    gateway = await start_gateway(engine, tls=ServerTls(pair.cert, pair.key, authority.ca))
    tls = ["--tls-ca", authority.ca, "--tls-cert", client.cert, "--tls-key", client.key]
    for flags, code, text in (
        (tls, 0, "demo"),
        ([*tls, "--tls-name", "localhost"], 0, "demo"),
        ([*tls, "--tls-name", "elsewhere"], 1, "UNAVAILABLE"),
        (tls[:2], 1, "UNAVAILABLE"),
        ([], 1, "UNAVAILABLE"),
        (tls[2:], 2, "--tls-ca"),
        (tls[:4], 2, "certificate"),
        (["--tls-ca", "/nonexistent"], 2, "/nonexistent"),
    ):
        command = ["models", "--server", str(gateway.server.address), *map(str, flags)]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert (result.exit_code, text in result.output) == (code, True), (flags, result.output)
    pairs = zip(("CA", "CERT", "KEY"), tls[1::2], strict=True)
    variables = {f"WEFT_TLS_{name}": str(value) for name, value in pairs}
    command = ["models", "--server", str(gateway.server.address)]
    result = await asyncio.to_thread(CliRunner(env=variables).invoke, app, command)
    assert result.exit_code == 0, result.output
