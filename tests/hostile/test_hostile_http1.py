"""The list's items about the HTTP/1.1 connection: lengths, headers, clocks, paths, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from typing import Any, NamedTuple

import httpx
import pytest

from tests.hostile.hostile_stack import Stack, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")
FLAGS = {"http_header_seconds": 1.0, "http_body_seconds": 1.5}
MIB = 1 << 20
BODY = json.dumps({"model": "demo", "prompt": [311, 312], "max_tokens": 2, "seed": 7}).encode()
JSON = b"Content-Type: application/json\r\n"
# How long a slow machine may take to notice that a time is over.
SLACK_S = 30.0


def post(
    headers: bytes, body: bytes = b"", *, host: bytes = b"Host: x\r\n", version: bytes = b"1.1"
) -> bytes:
    return b"POST /v1/completions HTTP/" + version + b"\r\n" + host + JSON + headers + b"\r\n" + body


def length(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n" % len(body)


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


CHUNKED = b"Transfer-Encoding: chunked\r\n"


class Raw(NamedTuple):
    """Bytes on a fresh connection, the statuses of what comes back, and the code in the last body."""

    id: str
    data: bytes
    statuses: list[int]
    code: str = ""


CASES = [
    Raw("H069-good", post(length(BODY), BODY), [200]),
    Raw("H069-length-too-short", post(length(BODY[:9]), BODY + b"\r\n\r\n"), [400, 400], "invalid_http"),
    Raw("H069-length-too-long", post(b"Content-Length: 999\r\n", BODY), [408]),
    Raw("H069-length-negative", post(b"Content-Length: -1\r\n", BODY), [400], "invalid_http"),
    Raw("H069-length-plus", post(b"Content-Length: +5\r\n", BODY), [400], "invalid_http"),
    Raw("H069-length-word", post(b"Content-Length: ten\r\n", BODY), [400], "invalid_http"),
    Raw("H069-length-5000-digits", post(b"Content-Length: " + b"9" * 5000 + b"\r\n"), [400]),
    Raw("H069-length-1e15", post(b"Content-Length: 999999999999999\r\n"), [413], "request_too_large"),
    Raw("H069-two-lengths", post(length(BODY) + b"Content-Length: 11\r\n", BODY), [400], "invalid_http"),
    Raw("H069-equal-lengths", post(length(BODY) * 2, BODY), [200]),
    Raw("H070-chunked", post(CHUNKED, chunked(BODY[:9], BODY[9:])), [200]),
    Raw("H070-chunked-and-length", post(CHUNKED + length(BODY), chunked(BODY)), [400], "ambiguous_length"),
    Raw("H070-length-and-chunked", post(length(b"abc") + CHUNKED, b"0\r\n\r\n"), [400], "ambiguous_length"),
    Raw("H070-chunked-in-1.0", post(CHUNKED, chunked(BODY), version=b"1.0"), [400], "ambiguous_length"),
    Raw("H070-gzip-chunked", post(b"Transfer-Encoding: gzip, chunked\r\n", chunked(BODY)), [501]),
    Raw("H070-chunked-twice", post(CHUNKED * 2, chunked(BODY)), [501]),
    Raw("H070-xchunked", post(b"Transfer-Encoding: xchunked\r\n", chunked(BODY)), [501]),
    Raw("H070-space-before-colon", post(b"Transfer-Encoding : chunked\r\n", chunked(BODY)), [400]),
    Raw("H070-chunk-of-no-size", post(CHUNKED, b"zz\r\n{}\r\n0\r\n\r\n"), [400], "invalid_http"),
    Raw("H070-chunk-of-2e80", post(CHUNKED, b"f" * 21 + b"\r\n"), [400], "invalid_http"),
    Raw("H070-chunk-without-end", post(CHUNKED, b"2\r\n{}xx0\r\n\r\n"), [400], "invalid_http"),
    Raw("H074-header-64KiB", post(b"X: " + b"a" * (64 << 10) + b"\r\n"), [431], "headers_too_long"),
    Raw("H074-1000-headers", post(b"X: 1\r\n" * 1000), [431], "too_many_headers"),
    Raw("H074-9000-headers", post(b"X: 1\r\n" * 9000), [431]),
    Raw("H074-100-headers", post(length(BODY) + b"X: 1\r\n" * 97, BODY), [200]),
    Raw("H074-101-headers", post(length(BODY) + b"X: 1\r\n" * 98, BODY), [431], "too_many_headers"),
    Raw("H074-header-of-nothing", post(b": 1\r\n"), [400], "invalid_http"),
    Raw("H074-nul-in-header", post(b"X: a\x00b\r\n"), [400], "invalid_http"),
    Raw("H075-host-with-path", b"GET /v1/models HTTP/1.1\r\nHost: a/healthz?x=\r\n\r\n", [200]),
    Raw("H075-no-host", post(length(BODY), BODY, host=b""), [400], "invalid_http"),
    Raw("H076-two-hosts", post(b"Host: y\r\n" + length(BODY), BODY), [400], "invalid_http"),
    Raw("H080-absolute-target", b"GET http://evil/healthz HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    Raw("H080-no-target", b"GET  HTTP/1.1\r\nHost: x\r\n\r\n", [400], "invalid_http"),
    Raw("H080-nul-in-target", b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", [400], "invalid_http"),
    Raw("H080-target-64KiB", b"GET /" + b"a" * (64 << 10) + b" HTTP/1.1\r\nHost: x\r\n\r\n", [431]),
    Raw("H081-http-1.0", b"GET /healthz HTTP/1.0\r\n\r\n", [200]),
    Raw("H081-http-0.9", b"GET /healthz\r\n\r\n", [400], "invalid_http"),
    Raw("H081-http-2-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505], "http_version"),
    Raw("H081-http-3.0", b"GET /healthz HTTP/3.0\r\nHost: x\r\n\r\n", [505], "http_version"),
    Raw("H082-tls-hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(512), [400]),
    Raw("H082-garbage", bytes(range(256)) * 16, [400]),
    Raw(
        "H081-upgrade-h2c",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        [200],
    ),
    Raw(
        "H081-upgrade-websocket",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        [200],
    ),
]  # fmt: skip


async def exchange(stack: Stack, data: bytes, num_answers: int) -> list[tuple[int, dict[str, str], bytes]]:
    """Send, and read whole answers. Fewer than wanted when the connection ends first."""
    reader, writer = await asyncio.open_connection(*stack.http)
    found = []
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            async with asyncio.timeout(FLAGS["http_body_seconds"] + SLACK_S):
                while len(found) < num_answers:
                    found.append(await read_answer(reader))
    except asyncio.IncompleteReadError:
        pass
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return found


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, body


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
async def test_raw(stack: Stack, case: Raw) -> None:
    async with stack.watched():
        answers = await exchange(stack, case.data, len(case.statuses))
    assert [status for status, _, _ in answers] == case.statuses, answers
    for status, headers, body in answers:
        if status != 200:
            assert headers["content-type"] == "application/json"
            error = json.loads(body)["error"]
            assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
            assert error["message"]
    if case.code:
        assert json.loads(answers[-1][2])["error"]["code"] == case.code


async def ends(reader: asyncio.StreamReader, within_s: float) -> bytes:
    """What comes until the server ends the connection."""
    async with asyncio.timeout(within_s):
        with contextlib.suppress(ConnectionError):
            return await reader.read()
    return b""


async def trickle(writer: asyncio.StreamWriter, data: bytes, gap_s: float = 0.05) -> None:
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(gap_s)


async def test_H071_a_million_chunks_of_one_byte(stack: Stack) -> None:
    async with stack.watched():
        begin = time.thread_time()
        reader, writer = await asyncio.open_connection(*stack.http)
        writer.write(post(CHUNKED))
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                writer.write(b"1\r\nx\r\n" * 1000)
                await writer.drain()
        answer = await ends(reader, SLACK_S)
        writer.close()
    assert not answer or b"HTTP/1.1 413 " in answer
    assert time.thread_time() - begin < 1.5


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["fresh", "used"])
async def test_H072_headers_byte_by_byte(stack: Stack, first: bytes) -> None:
    """Also on a connection that was used before."""
    async with stack.watched():
        reader, writer = await asyncio.open_connection(*stack.http)
        if first:
            writer.write(first)
            assert (await read_answer(reader))[0] == 200
        begin = time.monotonic()
        slow = asyncio.create_task(trickle(writer, b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 1000))
        assert await ends(reader, 1.0 + SLACK_S) == b""
        assert time.monotonic() - begin > 0.5
        slow.cancel()
        writer.close()


async def test_H072_a_connection_without_a_byte(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection(*stack.http)
    assert await ends(reader, 1.0 + SLACK_S) == b""
    writer.close()


@pytest.mark.parametrize("headers", [b"Content-Length: 5000\r\n", CHUNKED], ids=["length", "chunked"])
async def test_H073_a_body_byte_by_byte(stack: Stack, headers: bytes) -> None:
    async with stack.watched():
        reader, writer = await asyncio.open_connection(*stack.http)
        writer.write(post(headers))
        slow = asyncio.create_task(trickle(writer, b"1\r\n{\r\n" * 800))
        answer = await ends(reader, 1.5 + SLACK_S)
        slow.cancel()
        writer.close()
    assert b"HTTP/1.1 408 " in answer
    assert b"the body did not come within 1.5 s" in answer


@pytest.mark.parametrize("path", [b"/v1/nothing", b"/v1/completions"])
async def test_H073_a_refused_body_that_never_ends(stack: Stack, path: bytes) -> None:
    """Its request is answered, and what goes on coming is read for a while only."""
    async with stack.watched():
        reader, writer = await asyncio.open_connection(*stack.http)
        writer.write(
            b"POST "
            + path
            + b" HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 9999\r\n\r\n"
        )
        assert (await read_answer(reader))[0] in (404, 415)
        slow = asyncio.create_task(trickle(writer, b"x" * 9000))
        assert await ends(reader, 1.0 + SLACK_S) == b""
        slow.cancel()
        writer.close()


async def test_a_slow_answer_is_not_on_the_clock(stack: Stack, http: httpx.AsyncClient) -> None:
    body = {"prompt": [311], "max_tokens": 700, "seed": 1, "ignore_eos": True}
    begin = time.monotonic()
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert time.monotonic() - begin > 1.2


async def test_a_large_body_that_is_refused_is_answered(stack: Stack, http: httpx.AsyncClient) -> None:
    """The client gets the answer, though it writes all it has before it reads."""
    for size in (9 * MIB, 20 * MIB):
        answer = await http.post(
            "/v1/completions", content=b"x" * size, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
    answer = await http.post(
        "/v1/completions", content=b"x" * (4 * MIB), headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 415


async def test_H077_a_compressed_body(stack: Stack, http: httpx.AsyncClient) -> None:
    bomb = await asyncio.to_thread(gzip.compress, bytes(64 * MIB))
    for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip"):
        headers = {"content-type": "application/json", "content-encoding": encoding}
        async with stack.watched(max_hold_s=None):
            answer = await http.post("/v1/completions", content=bomb, headers=headers)
        assert answer.status_code == 415, encoding
        assert answer.json()["error"]["code"] == "unsupported_encoding"


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/json; charset=utf-16",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
    ],
)
async def test_H078_another_content_type(stack: Stack, http: httpx.AsyncClient, kind: str) -> None:
    answer = await http.post("/v1/completions", content=BODY, headers={"content-type": kind})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_type"


ROUTES = {
    "/v1/completions": {"POST"},
    "/v1/chat/completions": {"POST"},
    "/v1/models": {"GET", "HEAD"},
    "/v1/models/demo": {"GET", "HEAD"},
    "/healthz": {"GET", "HEAD"},
    "/metrics": {"GET", "HEAD"},
}


@pytest.mark.parametrize("route", ROUTES)
async def test_H079_every_method_on_every_route(stack: Stack, http: httpx.AsyncClient, route: str) -> None:
    async with stack.watched():
        for method in (
            "GET",
            "HEAD",
            "POST",
            "PUT",
            "PATCH",
            "DELETE",
            "OPTIONS",
            "TRACE",
            "CONNECT",
            "BREW",
        ):
            answer = await http.request(method, route)
            if method not in ROUTES[route]:
                assert answer.status_code == 405, method
                assert set(answer.headers["allow"].split(", ")) == ROUTES[route]
                assert answer.content == b"" or answer.json()["error"]["message"]
            elif method == "POST":
                assert answer.status_code == 400
            else:
                assert answer.status_code == 200
                assert bool(answer.content) == (method == "GET")


@pytest.mark.parametrize(
    "path",
    [
        "//v1//chat/completions", "/v1/completions/", "/v1/./completions", "/v1/../v1/completions",
        "/v1/%2e%2e/metrics", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/models/demo%00", "/v1/models/demo/", "/V1/completions", "/v1/completions;x", "/",
        "/docs", "/openapi.json",
        "/v1/models/%ff%fe", "/*", "/v1/models/" + "a" * 5000,
    ],
)  # fmt: skip
async def test_H080_paths(stack: Stack, path: str) -> None:
    """As they are on the wire: a client library would tidy them up."""
    for method in ("GET", "POST"):
        data = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
        [(status, _, body)] = await exchange(stack, data, 1)
        # A name below /v1/models/ is one path segment, whatever it spells; other methods are refused there.
        assert status == 404 or (status == 405 and path.startswith("/v1/models/")), (method, status)
        assert len(body) < 1024


LEAVES = {
    "after the headers": (post(b"Content-Length: 500\r\n"), 0),
    "in the body": (post(length(BODY), BODY[:20]), 0),
    "after the body": (post(length(BODY), BODY), 0),
    "with bytes behind": (post(length(BODY), BODY) + b"GET /hea", 0),
}


@pytest.mark.parametrize("way", ["close", "abort", "half"])
@pytest.mark.parametrize("point", LEAVES)
async def test_H083_H084_a_client_that_leaves(stack: Stack, point: str, way: str) -> None:
    """A client that says it will send no more has left, as far as anybody can tell: its request ends."""
    async with stack.watched():
        for _ in range(5):
            reader, writer = await asyncio.open_connection(*stack.http)
            writer.write(LEAVES[point][0])
            await writer.drain()
            if way == "abort":
                writer.transport.abort()
            elif way == "close":
                writer.close()
            else:
                writer.write_eof()
                await ends(reader, 1.5 + SLACK_S)
                writer.close()


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_H112_a_client_that_leaves_at_any_time(stack: Stack, is_stream: bool) -> None:
    """The slots of requests that nobody waits for come free, whenever it happens."""
    body = json.dumps({"prompt": [311], "max_tokens": 1000, "n": 4, "stream": is_stream, "seed": 1}).encode()
    async with stack.watched():
        for number in range(40):
            _, writer = await asyncio.open_connection(*stack.http)
            writer.write(post(length(body), body))
            await writer.drain()
            for _ in range(number // 2):
                await asyncio.sleep(0.002)
            writer.transport.abort()


async def test_H109_a_reader_that_does_not_read(stack: Stack) -> None:
    """Its slots are paused; nobody else notices. A small read buffer, or the kernel would hold it all."""
    link = stack.application.router.links[0]
    before = link.counters.pauses
    body = json.dumps(
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 900, "n": 8, "stream": True,
         "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    ).encode()  # fmt: skip
    async with stack.watched():
        _, writer = await asyncio.open_connection(*stack.http, limit=1024)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + JSON
        writer.write(head + length(body) + b"\r\n" + body)
        await eventually(lambda: link.counters.pauses > before, lambda: vars(link.counters), 30)
        writer.transport.abort()


async def test_pipelined_requests_are_answered_in_order(stack: Stack) -> None:
    data = b""
    for seed in range(3):
        body = json.dumps({"prompt": [311], "max_tokens": 2, "seed": seed, "request_id": f"p{seed}"}).encode()
        data += post(length(body), body)
    answers = await exchange(stack, data + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 4)
    assert [status for status, _, _ in answers] == [200] * 4
    assert [json.loads(body)["id"] for _, _, body in answers[:3]] == [f"cmpl-p{seed}" for seed in range(3)]


async def test_garbage_behind_a_request(stack: Stack) -> None:
    """The request is answered, then the rest is refused, or the connection ends."""
    async with stack.watched():
        for is_stream in (False, True):
            document: dict[str, Any] = {"prompt": [311], "max_tokens": 50, "stream": is_stream}
            body = json.dumps(document).encode()
            reader, writer = await asyncio.open_connection(*stack.http)
            writer.write(post(length(body), body))
            await asyncio.sleep(0.01)
            writer.write(b"\x00\xff" * 500 + b"\r\n\r\n")
            answer = await ends(reader, 30)
            assert answer.startswith(b"HTTP/1.1 200 ")
            writer.close()
