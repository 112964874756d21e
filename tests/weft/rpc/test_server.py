"""The life of a server process: order of start and stop, signals, taken ports, frozen peers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.weft.rpc.probe_service import Probe, call_kind, eventually
from weft.rpc import healthcheck
from weft.rpc.address import Address, parse_address, why_not_bound
from weft.rpc.channel import open_channel
from weft.rpc.options import channel_options, server_options
from weft.rpc.server import BindError, Server

SERVICE = Path(__file__).with_name("fake_service.py")
NAME = "test.v1.FakeService"


class Process:
    """A fake service in a process of its own, its log lines read as they come."""

    def __init__(self, *arguments: object, address: str = "127.0.0.1:0") -> None:
        root = SERVICE.parents[3]
        self.popen = subprocess.Popen(
            [sys.executable, str(SERVICE), address, *map(str, arguments)],
            stderr=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        self.events: list[dict[str, Any]] = []

    def wait_for(self, event: str) -> dict[str, Any]:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]
        raise AssertionError(f"no event {event!r} in {self.events}")

    def end(self, within_s: float = 10) -> int:
        assert self.popen.stderr is not None
        code = self.popen.wait(within_s)
        self.events += [json.loads(line) for line in self.popen.stderr]
        return code

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]


@pytest.fixture
def start():
    processes: list[Process] = []

    def begin(*arguments: object, **settings: Any) -> Process:
        processes.append(Process(*arguments, **settings))
        return processes[-1]

    yield begin
    for process in processes:
        process.popen.kill()
        process.popen.wait()
        if process.popen.stderr is not None:
            process.popen.stderr.close()


def test_sigterm_while_serving_drains_and_exits_zero(start, capsys):
    process = start(0, 0.5)
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    assert healthcheck.main([address]) == 0
    assert healthcheck.main([address, "--service", NAME]) == 0
    assert healthcheck.main([address, "--service", "no.Such"]) == 1
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for("draining")
    assert healthcheck.main([address]) == 1
    assert healthcheck.main([address, "--service", "liveness"]) == 0
    assert process.end() == 0
    order = [
        name for name in process.names() if name in ("stopping", "draining", "drained", "closed", "stopped")
    ]
    assert order == ["stopping", "draining", "drained", "closed", "stopped"]
    assert "NOT_SERVING" in capsys.readouterr().out
    assert healthcheck.main([address, "--timeout", "0.3"]) == 1


def test_while_loading_health_says_so_and_calls_are_refused(start):
    process = start(30, 0)
    address = process.wait_for("listening")["address"]
    assert healthcheck.check(address, "", 2) == "NOT_SERVING"
    assert healthcheck.check(address, "liveness", 2) == "SERVING"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{NAME}/Anything")(b"", timeout=2)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert ("grpc-retry-pushback-ms", "1000") in [(k, v) for k, v in caught.value.trailing_metadata()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_load_ends_the_process_at_once_with_zero(start, number):
    process = start(30, 30)
    process.wait_for("listening")
    started = time.monotonic()
    process.popen.send_signal(number)
    assert process.end() == 0
    assert time.monotonic() - started < 5
    assert "drained" not in process.names()
    assert "closed" in process.names()


def test_a_second_signal_exits_at_once_with_one(start):
    process = start(0, 30)
    process.wait_for("serving")
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for("draining")
    process.popen.send_signal(signal.SIGTERM)
    assert process.end(5) == 1


def test_a_fault_exits_with_its_code_and_without_a_drain(start):
    process = start(0, 30, "fault")
    assert process.end() == 70
    assert "draining" not in process.names()


def test_a_load_that_fails_closes_and_exits_one(start):
    process = start(0, 0, "fail")
    assert process.end() == 1
    assert "closed" in process.names()
    assert "serving" not in process.names()


def test_a_taken_port_is_one_clear_line(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = start(0, 0, address=address)
        assert process.end() == 1
    (reason,) = [event["reason"] for event in process.events if event["event"] == "cannot start"]
    assert reason == f"cannot listen on {address}: Address already in use"


async def test_an_address_of_another_machine_cannot_be_bound():
    for address in (Address("203.0.113.1", 0), Address("no-such-host.invalid", 0)):
        server = Server(())
        with pytest.raises(BindError, match="cannot listen on"):
            await server.start(address)
        await server.stop(0)


def test_one_address_of_a_name_is_enough(monkeypatch):
    """`localhost` is ::1 as well, in containers without IPv6 too."""
    stream = socket.SOCK_STREAM
    here = (socket.AF_INET, stream, 6, "", ("127.0.0.1", 0))
    elsewhere = (socket.AF_INET, stream, 6, "", ("203.0.113.1", 0))
    unknown = (socket.AF_MAX if hasattr(socket, "AF_MAX") else 45, stream, 0, "", ("x", 0))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        busy = (socket.AF_INET, stream, 6, "", taken.getsockname())
        for found, can_listen in (
            ([elsewhere, here], True),
            ([here, elsewhere], True),
            ([unknown, here], True),
            ([elsewhere], False),
            ([elsewhere, unknown], False),
            ([here, busy], False),
        ):
            monkeypatch.setattr(socket, "getaddrinfo", lambda *args, found=found, **kwargs: found)
            assert (why_not_bound(Address("name", 0)) is None) is can_listen, found


async def test_two_servers_never_share_a_port():
    one, two = Server(()), Server(())
    await one.start(Address("127.0.0.1", 0))
    with pytest.raises(BindError, match="in use"):
        await two.start(one.address)
    await one.stop(0)
    await two.stop(0)


async def test_health_is_watched_by_many_and_a_leaver_takes_nobody_along(probe_server, probe_channel):
    stub = health_pb2_grpc.HealthStub(probe_channel)
    watchers = [stub.Watch(health_pb2.HealthCheckRequest(service="")) for _ in range(3)]
    for watcher in watchers:
        assert (await watcher.read()).status == health_pb2.HealthCheckResponse.SERVING
    watchers.pop().cancel()
    await eventually(lambda: probe_server.counters.ended == 1)
    probe_server.set_not_serving()
    for watcher in watchers:
        assert (await watcher.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watcher.cancel()
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="x" * 1_000_000))
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


async def test_reflection_names_the_services(probe_server, probe_channel):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub = reflection_pb2_grpc.ServerReflectionStub(probe_channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]))
    names = {service.name for service in (await call.read()).list_services_response.service}
    call.cancel()
    assert {"test.v1.ProbeService", "grpc.health.v1.Health"} <= names


async def test_messages_over_the_cap_are_resource_exhausted(probe_service):
    server = Server(("test.v1.ProbeService",), is_public=True)
    probe_service.register(server.grpc)
    await server.start(Address("127.0.0.1", 0))
    server.set_serving()
    async with open_channel(str(server.address)) as channel:
        cap = 8 << 20
        for size, fits in ((cap - 6, True), (cap, False), (cap + 100, False)):
            payload = Probe(service="x" * size).SerializeToString()
            if fits:
                assert await call_kind(channel, "unary_unary", payload)
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_kind(channel, "unary_unary", payload)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "grpc-retry-pushback-ms" not in dict(caught.value.trailing_metadata() or ())
    await server.stop(0)


async def test_a_frozen_server_is_noticed_within_seconds(start, monkeypatch):
    process = start(0, 0)
    address = process.wait_for("listening")["address"]
    process.wait_for("serving")
    options = {**dict(channel_options()), "grpc.keepalive_time_ms": 500, "grpc.http2.ping_timeout_ms": 500}
    async with grpc.aio.insecure_channel(address, options=list(options.items())) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
        await watch.read()
        process.popen.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(20):
                await watch.read()
        process.popen.send_signal(signal.SIGCONT)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 8


def test_the_options_that_matter_are_set():
    for options in (server_options(is_public=True), server_options(is_public=False), channel_options()):
        found = dict(options)
        assert len(found) == len(options)
        assert found["grpc.http2.ping_timeout_ms"] <= found["grpc.keepalive_time_ms"]
    assert dict(server_options(is_public=False))["grpc.so_reuseport"] == 0
    assert dict(server_options(is_public=False))["grpc.max_receive_message_length"] == 64 << 20
    assert dict(server_options(is_public=True))["grpc.max_receive_message_length"] == 8 << 20


@pytest.mark.slow
async def test_a_connection_without_calls_is_left_alone():
    """The library's server takes more than two pings of one for abuse, and ends it."""
    server = Server(("test.v1.ProbeService",), is_public=True)
    await server.start(Address("127.0.0.1", 0))
    server.set_serving()
    async with open_channel(str(server.address)) as channel:
        await channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        ready = channel.get_state()
        await asyncio.sleep(50)
        assert channel.get_state() is ready is grpc.ChannelConnectivity.READY
    await server.stop(0)
    assert dict(channel_options())["grpc.enable_retries"] == 0
    assert dict(channel_options())["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        (":50051", ("127.0.0.1", 50051)),
        ("50051", ("127.0.0.1", 50051)),
        ("[::1]:0", ("::1", 0)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
        ("engine-1.weft:80", ("engine-1.weft", 80)),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert parse_address(str(parse_address(text))) == address


@pytest.mark.parametrize(
    "text",
    ["", ":", "host:", "host:x", "host:-1", "host:65536", "::1:80", "[x]:80", "a b:80", "h:٣", "http://h:80"],
)
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match="'"):
        parse_address(text)


def test_loopback():
    assert [Address(h, 1).is_loopback for h in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [Address(h, 1).is_loopback for h in ("0.0.0.0", "::", "example.org")] == [False] * 3
