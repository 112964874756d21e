"""The admin port: what it offers, to whom, and that the public port has none of it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.weft.rpc.certificates import Authority
from tests.weft.rpc.probe_service import SERVICE, ProbeService, call_kind
from weft import logs
from weft.rpc.address import Address
from weft.rpc.admin import admin_server
from weft.rpc.auth import Authenticator, hash_key
from weft.rpc.channel import open_channel
from weft.rpc.guard import Guard
from weft.rpc.reload import WatchedFiles
from weft.rpc.server import Server
from weft.rpc.tls import ChannelTls, ServerTls
from weft.v1 import admin_service_pb2 as pb
from weft.v1.admin_service_pb2_grpc import AdminServiceStub

METHODS = [f"/weft.v1.AdminService/{m.name}" for m in pb.DESCRIPTOR.services_by_name["AdminService"].methods]
CHANNELZ = [
    f"/grpc.channelz.v1.Channelz/{m.name}"
    for m in channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].methods
]
LOOPBACK = Address("127.0.0.1", 0)


@pytest.fixture
def guard() -> Guard:
    return Guard()


@pytest.fixture
async def server(guard: Guard) -> AsyncIterator[Server]:
    server = Server((SERVICE,), authenticator=guard.authenticator)
    ProbeService().register(server.grpc)
    await server.start(LOOPBACK)
    server.set_serving()
    yield server
    await server.stop(0)


@pytest.fixture
async def admin(server: Server, guard: Guard) -> AsyncIterator[Server]:
    admin = admin_server(server, guard)
    await admin.start(LOOPBACK)
    yield admin
    await admin.stop(0)


@pytest.fixture
async def channel(admin: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(str(admin.address)) as channel:
        yield channel


@pytest.fixture
def restored_levels() -> Any:
    root, ours = logging.getLogger().level, logging.getLogger("weft").level
    yield
    logs.stop()
    logging.getLogger().setLevel(root)
    logging.getLogger("weft").setLevel(ours)


async def test_the_status_is_of_the_other_server(server: Server, channel: grpc.aio.Channel) -> None:
    async with grpc.aio.insecure_channel(str(server.address)) as public:
        await call_kind(public, "unary_unary", b"")
        with pytest.raises(grpc.aio.AioRpcError):
            await call_kind(public, "unary_unary", b"\xff")
    status = await AdminServiceStub(channel).GetStatus(pb.GetStatusRequest())
    assert list(status.services) == [SERVICE]
    assert status.address == str(server.address)
    assert (status.calls_begun, status.calls_ended) == (2, 2)
    assert dict(status.calls_by_code) == {"OK": 1, "INVALID_ARGUMENT": 1}
    assert status.is_serving
    assert not status.is_stopping
    assert status.process_id > 0
    assert status.uptime_seconds > 0
    server.set_not_serving()
    assert not (await AdminServiceStub(channel).GetStatus(pb.GetStatusRequest())).is_serving


async def test_reloads_are_counted(server: Server, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no")

    files = (WatchedFiles("one", (), lambda: None), WatchedFiles("two", (), fail))
    admin = admin_server(server, Guard(watched=files))
    await admin.start(LOOPBACK)
    for each in files:
        each.poll(is_forced=True)
    async with grpc.aio.insecure_channel(str(admin.address)) as channel:
        status = await AdminServiceStub(channel).GetStatus(pb.GetStatusRequest())
    await admin.stop(0)
    assert [(f.what, f.reloads, f.failures) for f in status.files] == [("one", 1, 0), ("two", 0, 1)]


async def test_the_log_level_changes(channel: grpc.aio.Channel, restored_levels: None) -> None:
    logs.start("info")
    stub = AdminServiceStub(channel)
    for level, previous in (("debug", "info"), ("error", "debug"), ("info", "error")):
        assert (await stub.SetLogLevel(pb.SetLogLevelRequest(level=level))).previous == previous
        assert logging.getLogger("weft").isEnabledFor(logging.DEBUG) == (level == "debug")
        assert (await stub.GetStatus(pb.GetStatusRequest())).log_level == level
        # A library never speaks below WARNING: at DEBUG some of them log what they carry.
        assert not logging.getLogger("some.library").isEnabledFor(logging.INFO)
    for level in ("", "DEBUG", "trace", "critical", "x" * 10_000):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SetLogLevel(pb.SetLogLevelRequest(level=level))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_drain_is_a_stop_without_a_fault(server: Server, channel: grpc.aio.Channel) -> None:
    stub = AdminServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.StartDrain(pb.StartDrainRequest.FromString(b"\x78\x01"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not server.is_stopping
    await stub.StartDrain(pb.StartDrainRequest())
    assert server.is_stopping
    assert server.exit_code == 0
    assert (await stub.GetStatus(pb.GetStatusRequest())).is_stopping


async def test_channelz_knows_the_servers_of_the_process(server: Server, channel: grpc.aio.Channel) -> None:
    stub = channelz_pb2_grpc.ChannelzStub(channel)
    servers = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    assert len([each for each in servers if each.listen_socket]) >= 2  # this one, and the one it looks after
    # What is unknown, negative or empty has a status of its own, and harms nothing.
    for method, request in (
        ("GetServer", channelz_pb2.GetServerRequest(server_id=1 << 40)),
        ("GetSocket", channelz_pb2.GetSocketRequest(socket_id=-1)),
        ("GetChannel", channelz_pb2.GetChannelRequest()),
        ("GetSubchannel", channelz_pb2.GetSubchannelRequest(subchannel_id=5 << 40)),
        ("GetServerSockets", channelz_pb2.GetServerSocketsRequest(server_id=7 << 40)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request)
        assert caught.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT), method
    channels = (await stub.GetTopChannels(channelz_pb2.GetTopChannelsRequest())).channel
    ids = [each.ref.channel_id for each in channels]
    assert ids
    found = await stub.GetChannel(channelz_pb2.GetChannelRequest(channel_id=ids[-1]))
    assert found.channel.ref.channel_id == ids[-1]


async def test_health_is_its_own(server: Server, channel: grpc.aio.Channel) -> None:
    server.set_not_serving()
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", "weft.v1.AdminService", "liveness"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def code_of(channel: grpc.aio.Channel, method: str, key: str | None) -> str:
    metadata = [("authorization", f"Bearer {key}")] if key else None
    try:
        await channel.unary_unary(method)(b"", metadata=metadata, timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def a_key_file(directory: Path, methods: str) -> Path:
    path = directory / "keys"
    path.write_text(f"client:{hash_key('client')}\noperator:{hash_key('operator')} methods={methods}\n")
    return path


async def test_a_key_must_name_what_it_may_do_here(tmp_path: Path) -> None:
    keys = Authenticator.from_file(a_key_file(tmp_path, "GetStatus"))
    guard = Guard(authenticator=keys)
    server = Server((SERVICE,), authenticator=keys)
    await server.start(LOOPBACK)
    admin = admin_server(server, guard)
    await admin.start(LOOPBACK)
    try:
        async with grpc.aio.insecure_channel(str(admin.address)) as channel:
            for method in [*METHODS, *CHANNELZ, "/weft.v1.AdminService/Nope"]:
                assert await code_of(channel, method, None) == "UNAUTHENTICATED", method
                assert await code_of(channel, method, "wrong") == "UNAUTHENTICATED", method
                # A key that may do everything on the public port may do nothing here.
                assert await code_of(channel, method, "client") == "PERMISSION_DENIED", method
                expected = "OK" if method.endswith("/GetStatus") else "PERMISSION_DENIED"
                assert await code_of(channel, method, "operator") == expected, method
        assert not server.is_stopping
    finally:
        await admin.stop(0)
        await server.stop(0)


async def test_the_public_port_has_none_of_it(server: Server, admin: Server) -> None:
    async with grpc.aio.insecure_channel(str(server.address)) as channel:
        for method in [*METHODS, *CHANNELZ]:
            assert await code_of(channel, method, None) == "UNIMPLEMENTED", method
    assert not server.is_stopping


async def test_the_admin_port_may_ask_for_certificates_of_its_own(tmp_path: Path) -> None:
    clients, operators = Authority(tmp_path, "clients"), Authority(tmp_path, "operators")
    pair, client, operator = clients.sign("server"), clients.sign("client"), operators.sign("operator")
    tls = ServerTls(pair.cert, pair.key, clients.ca)
    admin_tls = ServerTls(pair.cert, pair.key, operators.ca)
    server = Server((SERVICE,), tls=tls)
    await server.start(LOOPBACK)
    admin = admin_server(server, Guard(tls=tls, admin_tls=admin_tls))
    await admin.start(LOOPBACK)
    try:
        for target, shown, is_in in (
            (admin, operator, True),
            (admin, client, False),
            (server, client, True),
            (server, operator, False),
        ):
            how = ChannelTls(clients.ca, shown.cert, shown.key)
            async with open_channel(str(target.address), tls=how) as channel:
                found = await code_of(channel, "/grpc.health.v1.Health/Check", None)
            assert (found == "OK") == is_in, (target.service_names, shown)
    finally:
        await admin.stop(0)
        await server.stop(0)
