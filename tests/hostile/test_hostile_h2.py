"""The list's items about HTTP/2 and gRPC framing, frame by frame, with what the library itself answers.

`0` to `16` is a grpc-status that the peer gets, `reset N` a stream that is reset, `closed` a connection that
ends. 13 (INTERNAL) here is the library's own word for bytes that break HTTP/2 or gRPC's framing, before any
handler: no code of ours sends it, and the servers' counters say so.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hyperframe.frame import GoAwayFrame, PingFrame, SettingsFrame, WindowUpdateFrame

from tests.hostile.hostile_stack import Stack, eventually, running_stack, token_request
from tests.hostile.raw_h2 import H2, MAX_WINDOW, PREFACE, call_headers, framed
from tools.mock_engine.oracle import expected_tokens
from weft.rpc.auth import Authenticator, hash_key
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")
GENERATE = "/weft.v1.GatewayService/Generate"
LIST = "/weft.v1.GatewayService/ListModels"
REQUEST = token_request([311, 312], 2, 7).SerializeToString()
LONG = token_request([311, 312], 900, 7).SerializeToString()
OK, CANCELLED, INVALID, DEADLINE, EXHAUSTED = "0", "1", "3", "4", "8"
UNIMPLEMENTED, LIBRARY, UNAVAILABLE, UNAUTHENTICATED = "12", "13", "14", "16"
CLOSED, RESET = "closed", "reset 2"
Act = Callable[[H2], Any]


class Case(NamedTuple):
    """What is done on a fresh connection, and how stream 1 ends; None: it does not, and is left open."""

    id: str
    act: Act
    outcome: str | None
    preface: bytes = PREFACE


def body(data: bytes, *more: tuple[str, str], path: str = GENERATE, is_last: bool = True) -> Act:
    """Headers of a call, then these bytes."""

    def act(h2: H2) -> None:
        h2.begin(1, call_headers(path, *more))
        h2.write(1, data, is_last=is_last)

    return act


def extra(*more: tuple[str, str], path: str = GENERATE, without: str = "") -> Act:
    """A good request with headers that are not."""

    def act(h2: H2) -> None:
        h2.begin(1, call_headers(path, *more, without=without))
        h2.write(1, framed(REQUEST))

    return act


def raw(kind: int, flags: int, stream: int, payload: bytes, *, then: bool = True) -> Act:
    """One frame built by hand, then a good request."""

    def act(h2: H2) -> None:
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        h2.raw(head + payload)
        if then:
            h2.call(1, GENERATE, REQUEST)

    return act


def begun(*acts: Act) -> Act:
    """A call whose headers are sent, then what happens to it."""

    def act(h2: H2) -> None:
        h2.begin(1, call_headers(GENERATE))
        for other in acts:
            other(h2)

    return act


def grant(stream: int, size: int) -> Act:
    return lambda h2: h2.send(WindowUpdateFrame(stream, window_increment=size))


GZIP = ("grpc-encoding", "gzip")
BAD_TIMEOUTS = ("-1S", "1x", "", "S", "1", "1e9S")
METHOD = [(":method", "GET"), *call_headers(GENERATE, without=":method")]

CASES = [
    Case("H085-good", extra(), OK),
    Case("H085-garbage-preface", lambda h2: None, CLOSED, b"GARBAGE / HTTP/9\r\n\r\n"),
    Case("H085-no-settings", lambda h2: None, CLOSED, PREFACE[:-1] + b"x"),
    Case("H086-prefix-9MiB", body(framed(b"x", length=9 << 20), is_last=False), EXHAUSTED),
    Case("H086-prefix-4GiB", body(framed(b"x", length=2**32 - 1), is_last=False), EXHAUSTED),
    Case("H087-message-cut-short", body(framed(REQUEST, length=len(REQUEST) + 50)), INVALID),
    Case("H087-prefix-cut-short", body(b"\x00\x00"), INVALID),
    Case("H087-no-message", lambda h2: h2.begin(1, call_headers(GENERATE), is_last=True), INVALID),
    Case("H087-no-message-unary", lambda h2: h2.begin(1, call_headers(LIST), is_last=True), INVALID),
    Case("H088-compressed-without-encoding", body(framed(REQUEST, is_compressed=True)), LIBRARY),
    Case("H088-flag-7", body(b"\x07" + framed(REQUEST)[1:]), INVALID),
    Case(
        "H089-unknown-encoding",
        body(framed(REQUEST, is_compressed=True), ("grpc-encoding", "zip-of-doom")),
        LIBRARY,
    ),
    Case("H090-gzip", body(framed(gzip.compress(REQUEST), is_compressed=True), GZIP), OK),
    Case("H090-gzip-that-is-none", body(framed(b"gzip", is_compressed=True), GZIP), LIBRARY),
    Case("H092-100-keys", extra(*[(f"x{i}", "1") for i in range(100)]), OK),
    Case("H092-1000-keys", extra(*[(f"x{i}", "1") for i in range(1000)]), EXHAUSTED),
    Case("H091-20KiB-before-the-settings", extra(("x-a", "a" * 20480)), EXHAUSTED),
    Case("H091-1MiB-before-the-settings", extra(("x-a", "a" * (1 << 20))), EXHAUSTED),
    Case("H091-20MiB", extra(("x-a", "a" * (20 << 20))), EXHAUSTED),
    Case("H093-bad-base64", extra(("x-bin", "!!!")), LIBRARY),
    *(Case(f"H094-timeout-{t or 'empty'}", extra(("grpc-timeout", t)), LIBRARY) for t in BAD_TIMEOUTS),
    Case("H094-timeout-0n", extra(("grpc-timeout", "0n")), DEADLINE),
    Case("H094-timeout-99999999H", extra(("grpc-timeout", "99999999H")), OK),
    Case("H095-timeout-999999999S", extra(("grpc-timeout", "999999999S")), OK),
    Case("H096-upper-case", extra(("X-Upper", "1")), LIBRARY),
    Case("H096-nul-in-name", extra(("x\x00a", "1")), LIBRARY),
    Case("H096-empty-name", extra(("", "1")), LIBRARY),
    Case("H097-traceparent", extra(("traceparent", "00-zz-\xff"), ("tracestate", "=" * 100)), OK),
    *(
        Case(f"H096-without-{name.strip(':')}", extra(without=name), RESET)
        for name in (":method", ":scheme", ":path", ":authority", "te")
    ),
    Case("H096-method-get", lambda h2: h2.begin(1, METHOD, is_last=True), RESET),
    *(
        Case(f"H099-path-{number}", extra(path=path), UNIMPLEMENTED)
        for number, path in enumerate(
            (
                "/no.Such/Method", "/weft.v1.GatewayService/Nope", "", "/", "generate", GENERATE.lower(),
                "/" + GENERATE, GENERATE + "?x", GENERATE + "/", "/weft.v1.EngineService/GetInfo",
                "/../weft.v1.GatewayService/Generate", "/" + "a" * 4000, "/\xff", GENERATE + "\xc3",
            )
        )
    ),
    Case("H100-two-messages-on-unary", body(framed(b"") * 2, path=LIST), OK),
    Case("H100-two-messages-on-generate", body(framed(REQUEST) * 2), OK),
    Case("H106-settings-of-5-bytes", raw(4, 0, 0, b"12345"), CLOSED),
    Case("H106-window-of-2e32", raw(4, 0, 0, b"\x00\x04\xff\xff\xff\xff"), CLOSED),
    Case("H106-ping-of-1-byte", raw(6, 0, 0, b"1"), CLOSED),
    Case("H106-unknown-frame", raw(0x77, 9, 0, b"abc"), OK),
    Case("H106-push-promise", raw(5, 4, 1, b"\x00\x00\x00\x02"), OK),
    Case("H106-frame-of-1MiB", raw(0, 0, 1, bytes(1 << 20), then=False), CLOSED),
    Case("H107-window-0", raw(8, 0, 0, bytes(4)), CLOSED),
    Case("H107-window-0-of-a-stream", begun(raw(8, 0, 1, bytes(4), then=False)), UNAVAILABLE),
    Case("H107-window-overflow", lambda h2: (grant(0, MAX_WINDOW)(h2), h2.call(1, GENERATE, REQUEST)), OK),
    Case("H107-window-overflow-of-a-stream", begun(grant(1, MAX_WINDOW), grant(1, MAX_WINDOW)), None),
    Case("H110-continuation-alone", raw(9, 4, 1, b"\x00"), CLOSED),
    Case("H110-hpack-garbage", raw(1, 4, 1, b"\xff" * 5, then=False), LIBRARY),
    Case("H110-hpack-table-of-256MiB", raw(1, 4, 1, b"\x3f\xe1\xff\xff\x7f", then=False), LIBRARY),
    Case("H110-headers-twice", begun(lambda h2: h2.begin(1, call_headers(GENERATE))), UNAVAILABLE),
    Case("H085-data-on-an-idle-stream", raw(0, 0, 9, b"x"), OK),
    Case("H085-even-stream", lambda h2: h2.call(2, GENERATE, REQUEST), None),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
async def test_frame(stack: Stack, case: Case) -> None:
    async with stack.watched():
        h2 = await H2.connect(stack.address, preface=case.preface)
        try:
            case.act(h2)
            if case.outcome is not None:
                found = await h2.status(1)
                assert found.split("goaway")[0] == case.outcome or (
                    case.outcome == CLOSED and found.startswith("goaway")
                ), (found, h2.headers.get(1))
            if case.outcome == OK:
                assert tokens(h2, 1) in ([], expected_tokens([311, 312], 7, 0, 2))
        finally:
            await h2.close()


def tokens(h2: H2, stream_id: int) -> list[int]:
    """The token ids in a Generate stream, or none when it is another call's."""
    found: list[int] = []
    rest = bytes(h2.data.get(stream_id, b""))
    while rest:
        size = int.from_bytes(rest[1:5], "big")
        found += pb.GenerateResponse.FromString(rest[5 : 5 + size]).delta.token_ids
        rest = rest[5 + size :]
    return found


async def test_H090_gzip_bomb(stack: Stack) -> None:
    """64 MiB of zeros in 64 KiB: unpacked in the library, up to the limit, beside the event loop."""
    bomb = await asyncio.to_thread(gzip.compress, bytes(64 << 20))
    async with stack.watched():
        h2 = await H2.connect(stack.address)
        body(framed(bomb, is_compressed=True), GZIP)(h2)
        assert await h2.status(1) == EXHAUSTED
        await h2.close()


async def test_H091_20KiB_of_metadata_from_a_client_of_the_library(stack: Stack) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stack.stub.ListModels(pb.ListModelsRequest(), metadata=(("x-a", "a" * 20480),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_H095_a_deadline_of_1e12_s(stack: Stack) -> None:
    """The library's own clock overflows: the deadline has passed at once. The longest usual one is a day."""
    for seconds, code in ((1e12, grpc.StatusCode.DEADLINE_EXCEEDED), (86_400.0, None)):
        call = stack.stub.ListModels(pb.ListModelsRequest(), timeout=seconds)
        if code is None:
            await call
            continue
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is code


KEYS = {
    "H098-missing": ((), UNAUTHENTICATED),
    "H098-wrong": ((("authorization", "Bearer no"),), UNAUTHENTICATED),
    "H098-lower-case-scheme": ((("authorization", "bearer key-a"),), OK),
    "H098-other-scheme": ((("authorization", "Basic key-a"),), UNAUTHENTICATED),
    "H098-two-values": ((("authorization", "Bearer key-a"),) * 2, UNAUTHENTICATED),
    "H098-two-ways": ((("authorization", "Bearer key-a"), ("x-api-key", "key-a")), UNAUTHENTICATED),
    "H098-10KiB": ((("authorization", "Bearer " + "k" * 10240),), UNAUTHENTICATED),
    "H098-64KiB": ((("authorization", "Bearer " + "k" * 65536),), EXHAUSTED),
    "H098-empty": ((("authorization", ""),), UNAUTHENTICATED),
    "H098-no-key": ((("authorization", "Bearer "),), UNAUTHENTICATED),
    "H098-latin-1": ((("authorization", "Bearer k\xe9y"),), UNAUTHENTICATED),
    "H098-good": ((("authorization", "Bearer key-a"),), OK),
}


async def test_H098_keys() -> None:
    """Also for methods that do not exist: a stranger does not learn which do."""
    authenticator = Authenticator({"a": hash_key("key-a")})
    async with running_stack(authenticator=authenticator) as stack:
        for name, (metadata, outcome) in KEYS.items():
            for path in (LIST, "/weft.v1.GatewayService/Nope"):
                h2 = await H2.connect(stack.address)
                h2.call(1, path, b"", *metadata)
                wanted = UNIMPLEMENTED if outcome == OK and path != LIST else outcome
                assert await h2.status(1) == wanted, (name, path)
                await h2.close()
        await stack.idle()


EMPTY = {
    "GatewayService": {
        "Generate": INVALID, "Multiplex": OK, "Cancel": INVALID, "Tokenize": INVALID, "Detokenize": OK,
        "ListModels": OK, "CreateSession": None, "GetSession": None, "DeleteSession": None,
    },
    "EngineService": {
        "Connect": INVALID, "GenerateTokens": INVALID, "GetInfo": OK, "GetLoad": OK, "Drain": OK,
    },
}  # fmt: skip


async def test_H101_an_empty_message_on_every_method() -> None:
    """proto3 cannot tell it from one that says nothing; what must be said is asked for by name."""
    services = {**pb.DESCRIPTOR.services_by_name, **engine_pb.DESCRIPTOR.services_by_name}
    async with running_stack() as stack:
        for service, methods in EMPTY.items():
            assert set(methods) == {method.name for method in services[service].methods}
            address = stack.address if service == "GatewayService" else stack.engine.address
            for method, outcome in methods.items():
                h2 = await H2.connect(address)
                h2.call(1, f"/weft.v1.{service}/{method}", b"")
                found = await h2.status(1)
                assert found == outcome or (outcome is None and found not in ("2", "13")), (method, found)
                await h2.close()
        await eventually(lambda: not stack.balance(), stack.balance)


async def test_H104_streams_opened_and_reset(stack: Stack) -> None:
    """10,000 on one connection. The library may answer with GOAWAY; whoever asked next to it is served."""
    async with stack.watched(max_hold_s=None):
        h2 = await H2.connect(stack.address)
        for number in range(10_000):
            stream_id = 2 * number + 1
            h2.begin(stream_id, call_headers(GENERATE))
            h2.write(stream_id, framed(LONG))
            h2.reset(stream_id)
            if number % 200 == 0:
                await h2.drain()
                await asyncio.sleep(0)
        await h2.drain()
        await h2.close()


async def connections(stack: Stack, count: int) -> None:
    """Open at the same time, half of them with a preface, on the gRPC port; then on the HTTP port."""
    for address in (stack.address, stack.http):
        opened = []
        for number in range(count):
            opened.append(await asyncio.open_connection(*address))
            if number % 2:
                opened[-1][1].write(PREFACE[: number % 24])
        await stack.probe()
        for _, writer in opened:
            writer.transport.abort()


async def test_H105_connections(stack: Stack) -> None:
    async with stack.watched():
        await connections(stack, 500)


@pytest.mark.slow
async def test_H105_connections_5000(stack: Stack) -> None:
    """Both ends are in this process: 5,000 connections are 10,000 files."""
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 11_000:
        pytest.skip("too few files may be open")
    async with stack.watched(max_hold_s=None):
        await connections(stack, 5000)


async def flood(stack: Stack, data: bytes, count: int) -> H2:
    h2 = await H2.connect(stack.address)
    for _ in range(count // 100):
        h2.raw(data * 100)
        await h2.drain()
        if h2.is_closed:
            break
    return h2


async def test_H106_settings_flood(stack: Stack) -> None:
    async with stack.watched():
        h2 = await flood(stack, SettingsFrame(0, settings={4: 65535}).serialize(), 20_000)
        await h2.close()


async def test_H106_ping_flood(stack: Stack) -> None:
    """ENHANCE_YOUR_CALM, if the peer still reads: more pings than one without a call may send end its
    connection.
    """
    async with stack.watched():
        h2 = await flood(stack, PingFrame(0, opaque_data=b"12345678").serialize(), 20_000)
        assert await h2.closed() in (11, None)
        await h2.close()


async def test_H110_continuation_flood(stack: Stack) -> None:
    """A header block that never ends: 20 MiB of it, in frames of nothing and in frames of 16 KiB."""
    async with stack.watched(max_hold_s=None):
        for payload, count in ((b"", 20_000), (b"\x00\x01a\x7f\x81\x7f" + b"a" * 16384, 1280)):
            h2 = await H2.connect(stack.address)
            raw(1, 0, 1, b"", then=False)(h2)
            head = len(payload).to_bytes(3, "big") + bytes([9, 0, 0, 0, 0, 1])
            for _ in range(count):
                h2.raw(head + payload)
                if h2.is_closed:
                    break
            await h2.drain()
            await h2.close()


async def test_H108_a_client_that_grants_no_window(stack: Stack) -> None:
    """Its own slots are paused, or their output is small; nobody else waits for it."""
    async with stack.watched():
        h2 = await H2.connect(stack.address, settings={4: 0}, grants=False)
        for number in range(4):
            h2.call(2 * number + 1, GENERATE, LONG)
        await eventually(
            lambda: stack.server.counters.begun > stack.server.counters.ended + 4, lambda: "", 10
        )
        await asyncio.sleep(0.5)
        assert not h2.data
        await h2.close()


async def test_H109_a_client_that_grants_a_byte_at_a_time(stack: Stack) -> None:
    async with stack.watched():
        h2 = await H2.connect(stack.address, settings={4: 1}, grants=False)
        h2.call(1, GENERATE, LONG)
        for _ in range(50):
            h2.send(WindowUpdateFrame(1, window_increment=1))
            await asyncio.sleep(0.01)
        await h2.wait(lambda: len(h2.data.get(1, b"")) >= 40)
        await h2.close()


async def test_H111_goaway_from_the_client(stack: Stack) -> None:
    """What runs goes on; it is the client's own wish to open no more."""
    async with stack.watched():
        h2 = await H2.connect(stack.address)
        h2.call(1, GENERATE, token_request([311, 312], 100, 7).SerializeToString())
        await h2.wait(lambda: h2.data.get(1))
        h2.send(GoAwayFrame(0, last_stream_id=0, error_code=2))
        assert await h2.status(1) in (OK, CLOSED)
        await h2.close()


@pytest.mark.parametrize("method", ["generate", "multiplex", "engine"])
async def test_H112_a_cancel_at_every_point(stack: Stack, method: str) -> None:
    """Before the first message is read, while it is tokenized, queued, running, and at the end."""
    service = "EngineService/GenerateTokens" if method == "engine" else "GatewayService/Generate"
    message = LONG
    if method == "multiplex":
        service = "GatewayService/Multiplex"
        request = pb.MultiplexRequest(stream_id=1, generate=token_request([311], 900, 7))
        message = request.SerializeToString()
    elif method == "engine":
        request = token_request([311], 900, 7)
        message = engine_pb.GenerateTokensRequest(
            prompt_token_ids=[311], sampling=request.sampling
        ).SerializeToString()
    async with stack.watched():
        h2 = await H2.connect(stack.engine.address if method == "engine" else stack.address)
        for number in range(60):
            stream_id = 2 * number + 1
            h2.begin(stream_id, call_headers(f"/weft.v1.{service}"))
            if number % 4:
                h2.write(stream_id, framed(message), is_last=number % 4 != 2)
            for _ in range(number // 3):
                await asyncio.sleep(0.001)
            h2.reset(stream_id)
        await h2.close()


async def test_H116_names_of_1MiB(stack: Stack) -> None:
    name = "x" * (1 << 20)
    async with stack.watched():
        health = health_pb2_grpc.HealthStub(stack.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert len(caught.value.details() or "") < 1000
        watch = health.Watch(health_pb2.HealthCheckRequest(service=name))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
        stub = reflection_pb2_grpc.ServerReflectionStub(stack.channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)])
        )
        assert (await call.read()).error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        call.cancel()


async def watches(stack: Stack, count: int) -> None:
    """Health watches, 900 a connection; all are told when the gateway stops being ready, and ready again."""
    opened = []
    data = framed(b"")
    for first in range(0, count, 900):
        h2 = await H2.connect(stack.address)
        opened.append(h2)
        for number in range(min(900, count - first)):
            h2.begin(2 * number + 1, call_headers("/grpc.health.v1.Health/Watch"))
            h2.write(2 * number + 1, data)
            if number % 50 == 0:
                await h2.drain()
                await asyncio.sleep(0)
    try:
        for h2, first in zip(opened, range(0, count, 900), strict=True):
            await h2.wait(lambda h2=h2, n=min(900, count - first): len(h2.data) == n, 240)
        stack.server.health.set_serving(False)
        stack.server.health.set_serving(True)
        assert stack.server.counters.begun - stack.server.counters.ended >= count
    finally:
        for h2 in opened:
            await h2.close()


async def test_H117_health_watches(stack: Stack) -> None:
    async with stack.watched(max_hold_s=1.0):
        await watches(stack, 1000)


@pytest.mark.slow
async def test_H117_health_watches_1e4(stack: Stack) -> None:
    async with stack.watched(max_hold_s=None):
        await watches(stack, 10_000)
