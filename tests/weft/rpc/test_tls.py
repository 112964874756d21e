"""Certificates on real sockets: rotation under load, authorities that change, and all that must fail."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from tests.weft.rpc.certificates import Authority, Pair
from tests.weft.rpc.probe_service import SERVICE, Probe, ProbeService, call_kind, eventually
from weft.config import ConfigError
from weft.rpc import healthcheck
from weft.rpc.address import Address
from weft.rpc.channel import open_channel
from weft.rpc.guard import ServerFlags, check_server_flags, guard_of
from weft.rpc.reload import WatchedFiles, watch
from weft.rpc.server import Server
from weft.rpc.tls import ChannelTls, ServerTls, TlsError

HELLO = Probe(service="hello").SerializeToString()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "other")


Start = Callable[[ServerTls | None], Any]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    servers: list[Server] = []

    async def begin(tls: ServerTls | None) -> Server:
        server = Server((SERVICE,), tls=tls)
        ProbeService().register(server.grpc)
        await server.start(Address("127.0.0.1", 0))
        server.set_serving()
        servers.append(server)
        return server

    yield begin
    for server in servers:
        await server.stop(0)


async def outcome(server: Server, tls: ChannelTls | None) -> str:
    """What a call over a new connection comes to: "OK", or its status."""
    async with open_channel(str(server.address), tls=tls) as channel:
        try:
            await call_kind(channel, "unary_unary", HELLO, seconds=5)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


async def serial_of(server: Server, ca: Path) -> int:
    """The number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(server.address.host, server.address.port, ssl=context)
    data = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(data).serial_number


def serial_in(pair: Pair) -> int:
    return x509.load_pem_x509_certificate(pair.cert.read_bytes()).serial_number


async def test_who_gets_in(authority: Authority, other: Authority, start: Start) -> None:
    pair, client = authority.sign("server"), authority.sign("client")
    one_way = await start(ServerTls(pair.cert, pair.key))
    mutual = await start(ServerTls(pair.cert, pair.key, authority.ca))
    plain = await start(None)
    stranger, late = other.sign("stranger"), authority.sign("late", days=-1)
    for server, tls, expected in (
        (one_way, ChannelTls(authority.ca), "OK"),
        (one_way, ChannelTls(authority.ca, client.cert, client.key), "OK"),
        (one_way, ChannelTls(other.ca), "UNAVAILABLE"),
        (one_way, ChannelTls(authority.ca, name="elsewhere"), "UNAVAILABLE"),
        (one_way, ChannelTls(authority.ca, name="localhost"), "OK"),
        (one_way, None, "UNAVAILABLE"),
        (plain, ChannelTls(authority.ca), "UNAVAILABLE"),
        (mutual, ChannelTls(authority.ca, client.cert, client.key), "OK"),
        (mutual, ChannelTls(authority.ca), "UNAVAILABLE"),
        (mutual, ChannelTls(authority.ca, stranger.cert, stranger.key), "UNAVAILABLE"),
        (mutual, ChannelTls(authority.ca, late.cert, late.key), "UNAVAILABLE"),
        (mutual, None, "UNAVAILABLE"),
    ):
        assert await outcome(server, tls) == expected, (server.tls, tls)
    # And none of it has harmed the servers.
    assert await outcome(one_way, ChannelTls(authority.ca)) == "OK"
    assert await outcome(mutual, ChannelTls(authority.ca, client.cert, client.key)) == "OK"


async def test_a_server_whose_certificate_has_expired_is_not_called(
    authority: Authority, start: Start
) -> None:
    pair = authority.sign("server", days=-1)
    server = await start(ServerTls(pair.cert, pair.key))
    assert await outcome(server, ChannelTls(authority.ca)) == "UNAVAILABLE"


async def test_rotation_under_load(authority: Authority, start: Start) -> None:
    """Calls on new connections never fail, new handshakes see the new pair, a stream that runs goes on."""
    pair = authority.sign("server")
    tls = ServerTls(pair.cert, pair.key)
    server = await start(tls)
    files = WatchedFiles("certificates", tls.paths, tls.reload)
    client = ChannelTls(authority.ca)
    outcomes: list[str] = []
    is_over = asyncio.Event()

    async def load() -> None:
        while not is_over.is_set():
            outcomes.append(await outcome(server, client))

    watcher = asyncio.create_task(watch([files], 0.02))
    loads = [asyncio.create_task(load()) for _ in range(2)]
    try:
        async with open_channel(str(server.address), tls=client) as channel:
            stream = channel.stream_stream(f"/{SERVICE}/stream_stream", None, Probe.FromString)()
            await stream.write(HELLO)
            assert (await stream.read()).service == "hello"
            seen = {await serial_of(server, authority.ca)}
            for _ in range(3):
                new = serial_in(authority.sign("server"))  # in place: for a moment the two do not fit
                async with asyncio.timeout(20):
                    while await serial_of(server, authority.ca) != new:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                seen.add(new)
                await stream.write(HELLO)
                assert (await stream.read()).service == "hello"
            await stream.done_writing()
            stream.cancel()
    finally:
        is_over.set()
        await asyncio.gather(*loads)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    assert len(seen) == 4
    assert set(outcomes) == {"OK"}
    assert len(outcomes) > 4
    assert files.num_reloads >= 3


def break_mismatch(pair: Pair, authority: Authority) -> None:
    shutil.copy(authority.sign("elsewhere").key, pair.key)


def break_garbage(pair: Pair, authority: Authority) -> None:
    pair.cert.write_text("-----BEGIN CERTIFICATE-----\nsecretword\n-----END CERTIFICATE-----\n")


def break_no_pem(pair: Pair, authority: Authority) -> None:
    pair.key.write_text("secretword")


def break_gone(pair: Pair, authority: Authority) -> None:
    pair.key.unlink()


def break_directory(pair: Pair, authority: Authority) -> None:
    pair.key.unlink()
    pair.key.mkdir()


def break_size(pair: Pair, authority: Authority) -> None:
    pair.cert.write_bytes(pair.cert.read_bytes() + b"\n" * (1 << 20))


def break_authority(pair: Pair, authority: Authority) -> None:
    (authority.directory / "clients.pem").write_text("-----BEGIN CERTIFICATE-----\n")


@pytest.mark.parametrize(
    "damage",
    [
        break_mismatch,
        break_garbage,
        break_no_pem,
        break_gone,
        break_directory,
        break_size,
        break_authority,
    ],
)
async def test_a_broken_new_pair_keeps_the_old(
    authority: Authority, start: Start, damage: Callable[[Pair, Authority], None]
) -> None:
    pair, client = authority.sign("server"), authority.sign("client")
    clients = authority.directory / "clients.pem"
    shutil.copy(authority.ca, clients)
    tls = ServerTls(pair.cert, pair.key, clients)
    server = await start(tls)
    files = WatchedFiles("certificates", tls.paths, tls.reload)
    damage(pair, authority)
    files.poll()
    assert (files.num_reloads, files.num_failures) == (0, 1)
    files.poll()
    assert files.num_failures == 1  # told once
    with pytest.raises(TlsError) as caught:
        ServerTls(pair.cert, pair.key, clients)
    assert "secretword" not in str(caught.value)
    assert await outcome(server, ChannelTls(authority.ca, client.cert, client.key)) == "OK"


async def test_an_authority_that_is_replaced_lets_its_clients_in_no_more(
    authority: Authority, other: Authority, start: Start
) -> None:
    pair, old, new = authority.sign("server"), authority.sign("old"), other.sign("new")
    clients = authority.directory / "clients.pem"
    shutil.copy(authority.ca, clients)
    tls = ServerTls(pair.cert, pair.key, clients)
    server = await start(tls)
    other_port = await asyncio.start_server(say_hi, "127.0.0.1", 0, ssl=tls.context())
    try:
        for ca, is_old_in in ((authority.ca, True), (other.ca, False), (authority.ca, True)):
            shutil.copy(ca, clients)
            tls.reload()
            for shown, is_in in ((old, is_old_in), (new, not is_old_in)):
                found = await outcome(server, ChannelTls(authority.ca, shown.cert, shown.key))
                assert (found == "OK") == is_in
                assert (await hear(other_port, authority.ca, shown) == b"hi") == is_in
    finally:
        other_port.close()
        await other_port.wait_closed()


async def say_hi(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hi")
    writer.close()


async def hear(server: asyncio.Server, ca: Path, pair: Pair) -> bytes:
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(pair.cert, pair.key)
    try:
        address = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(*address, ssl=context)
        data = await reader.read()
    except (ssl.SSLError, ConnectionError):
        return b""
    writer.close()
    return data


def visit(port: Any, context: ssl.SSLContext, session: Any) -> tuple[Any, bool]:
    """One connection that tries to go on with a session; the new session, and whether it could."""
    with socket.create_connection(port) as plain:
        with context.wrap_socket(plain, server_hostname="localhost", session=session) as wrapped:
            wrapped.recv(10)
            return wrapped.session, bool(wrapped.session_reused)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_no_session_outlives_its_certificates(authority: Authority, version: ssl.TLSVersion) -> None:
    """A client that was let in once must not come back by its session after its authority is gone."""
    pair = authority.sign("server")
    tls = ServerTls(pair.cert, pair.key)
    server = await asyncio.start_server(say_hi, "127.0.0.1", 0, ssl=tls.context())
    try:
        context = ssl.create_default_context(cafile=authority.ca)
        context.minimum_version = context.maximum_version = version
        port = server.sockets[0].getsockname()
        session, _ = await asyncio.to_thread(visit, port, context, None)
        tls.reload()
        _, is_reused = await asyncio.to_thread(visit, port, context, session)
        assert not is_reused
    finally:
        server.close()
        await server.wait_closed()


async def test_healthcheck_over_tls(
    authority: Authority, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, client = authority.sign("server"), authority.sign("client")
    server = await start(ServerTls(pair.cert, pair.key, authority.ca))
    flags = ["--tls-ca", str(authority.ca), "--tls-cert", str(client.cert), "--tls-key", str(client.key)]
    for arguments, code in ((flags, 0), (flags[:2], 1), ([], 1)):
        command = [str(server.address), "--timeout", "3", *arguments]
        assert await asyncio.to_thread(healthcheck.main, command) == code, arguments
    for bad in (flags[2:], [*flags[:2], *flags[2:4]], ["--tls-ca", "/nonexistent"]):
        with pytest.raises(SystemExit):
            await asyncio.to_thread(healthcheck.main, [str(server.address), *bad])
    assert capsys.readouterr().out.split() == ["SERVING", "UNAVAILABLE", "UNAVAILABLE"]


async def test_a_hangup_reloads_at_once(tmp_path: Path) -> None:
    reloads: list[int] = []
    files = WatchedFiles("x", (tmp_path / "x",), lambda: reloads.append(1))
    watcher = asyncio.create_task(watch([files], 3600))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGHUP)
    await eventually(lambda: reloads, 10)
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)


def test_what_could_not_be_read_is_tried_again_and_told_once(tmp_path: Path) -> None:
    """A volume that is away for a moment: when it is back, the file is the same."""
    problems = [OSError("away"), OSError("away"), OSError("other"), None, None]
    calls: list[int] = []

    def reload() -> None:
        calls.append(1)
        if (problem := problems.pop(0)) is not None:
            raise problem

    path = tmp_path / "x"
    files = WatchedFiles("x", (path,), reload)
    path.write_text("new")
    for num_calls, num_failures, num_reloads in ((1, 1, 0), (2, 1, 0), (3, 2, 0), (4, 2, 1), (4, 2, 1)):
        files.poll()
        assert (len(calls), files.num_failures, files.num_reloads) == (num_calls, num_failures, num_reloads)
    path.chmod(0o600)
    files.poll()
    assert files.num_reloads == 2


class Flags(ServerFlags):
    """A configuration with the flags of every server."""

    api_key_file: Path | None = None


def test_flags_that_do_not_go_together(authority: Authority) -> None:
    pair = authority.sign("server")
    everywhere = Address("0.0.0.0", 0)
    for flags in (
        {"tls_cert": pair.cert},
        {"tls_key": pair.key},
        {"tls_client_ca": authority.ca},
        {"admin_client_ca": authority.ca},
        {"tls_reload_seconds": 0.0},
        {"admin": everywhere},
        {"admin": everywhere, "tls_cert": pair.cert, "tls_key": pair.key, "tls_client_ca": authority.ca},
    ):
        with pytest.raises(ConfigError):
            check_server_flags(Flags(**flags))  # type: ignore[arg-type]
    full = Flags(admin=everywhere, admin_client_ca=authority.ca, tls_cert=pair.cert, tls_key=pair.key)
    check_server_flags(full)
    guard = guard_of(full)
    assert guard.tls is not None
    assert not guard.tls.is_mutual
    assert guard.admin_tls is not None
    assert guard.admin_tls.is_mutual
    assert len(guard.watched) == 2
