"""What bad input gets over HTTP: the right status and an error body, and the server goes on."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from weft.rpc.address import parse_address

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
TEXT: dict[str, Any] = {"model": "demo", "prompt": "hi", "max_tokens": 3}


@pytest.fixture
async def http(gateway: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.http_url, timeout=20) as client:
        yield client
        answer = await client.post("/v1/completions", json=TEXT)
        assert answer.status_code == 200, "the server does not serve any more"


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 2**64}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "1"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e38}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"n": True}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": [1]}, "stop"),
    ({"stop": "x" * 2**20}, "stop[0]"),
    ({"logit_bias": {"4096": 1}}, "logit_bias[0].token_id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": None}}, "logit_bias"),
    ({"stop_token_ids": [None]}, "stop_token_ids"),
    ({"presence_penalty": 5}, "presence_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"stream": "yes"}, "stream"),
    ({"best_of": 3}, "best_of"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"user": 5}, "user"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"request_id": "a b"}, "request_id"),
    ({"frobnicate": 1}, "frobnicate"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_bad_fields_are_named(http: httpx.AsyncClient, engine: Any, path: str) -> None:
    base = CHAT if "chat" in path else TEXT
    for fields, param in BAD_FIELDS:
        answer = await http.post(path, json={**base, **fields})
        assert answer.status_code == 400, (fields, answer.text)
        error = answer.json()["error"]
        assert error["param"] == param, (fields, error)
        assert error["type"] == "invalid_request_error"
        assert param.split("[")[0] in error["message"]


TAKEN: list[dict[str, Any]] = [
    {"user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "best_of": 1},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
    {"temperature": None, "stop": None, "stream": None, "logit_bias": None},
    {"logit_bias": {"300": -100, "301": 5}, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
    {"ignore_eos": True, "min_tokens": 2, "stop_token_ids": [7], "skip_special_tokens": False},
    {"echo": False, "suffix": None, "priority": -3, "cache_salt": "x"},
]


async def test_what_is_taken(http: httpx.AsyncClient, engine: Any) -> None:
    for fields in TAKEN:
        answer = await http.post("/v1/chat/completions", json={**CHAT, **fields})
        assert answer.status_code == 200, (fields, answer.text)


async def test_fields_reach_the_engine(http: httpx.AsyncClient, engine: Any) -> None:
    fields = {"logit_bias": {"300": -100}, "top_k": 5, "min_tokens": 2, "priority": -3, "cache_salt": "x"}
    await http.post("/v1/completions", json={**TEXT, **fields})
    submit = engine.submits[0]
    assert [(b.token_id, b.bias) for b in submit.sampling.logit_bias] == [(300, -100.0)]
    assert (submit.sampling.top_k, submit.sampling.min_tokens) == (5, 2)
    assert (submit.priority, submit.cache_salt) == (-3, "x")


BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"hello",
    "cut short": json.dumps(TEXT).encode()[:-1],
    "a list": b"[1]",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "1e999": b'{"prompt": "x", "temperature": 1e999}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate in a key": b'{"\\udfff": 1}',
    "duplicate key": b'{"prompt": "x", "prompt": "y"}',
    "depth 100,000": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "5,000 digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "a million keys": b"{" + b",".join(b'"%d":1' % i for i in range(500_000)) + b"}",
    "byte order mark": b"\xef\xbb\xbf{}",
}


async def test_bodies_that_are_no_request(http: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    for name, body in BAD_BODIES.items():
        answer = await http.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == 400, (name, answer.text)
        assert answer.json()["error"]["code"] == "invalid_json", name


async def test_a_request_of_100_mb(http: httpx.AsyncClient, gateway: Any) -> None:
    address = gateway.application.http.address
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 104857600\r\n\r\n" + b"x" * 1000
    )
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * (1 << 20)

    try:
        answer = await http.post(
            "/v1/completions", content=endless(), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # the server closed before the client had written it all


async def test_compressed_and_foreign_bodies(http: httpx.AsyncClient) -> None:
    data = json.dumps(TEXT).encode()
    for headers, content in (
        ({"content-type": "application/json", "content-encoding": "gzip"}, gzip.compress(data)),
        ({"content-type": "text/plain"}, data),
        ({"content-type": "application/json; charset=utf-16"}, data),
        ({"content-type": "application/x-www-form-urlencoded"}, data),
    ):
        answer = await http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 415, headers


async def test_paths_and_methods(http: httpx.AsyncClient) -> None:
    for method, path, status in (
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("TRACE", "/healthz", 405),
        ("POST", "//v1//completions", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e", 404),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
    ):
        answer = await http.request(method, path)
        assert answer.status_code == status, (method, path)
        assert answer.json()["error"]["message"]


async def test_the_host_header_is_nothing(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/models", headers={"host": "evil/healthz?x="})
    assert answer.json()["object"] == "list"


MESSAGES = [
    [],
    [{"role": "user"}],
    [{"content": "x"}],
    ["x"],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": "x", "tool_calls": [{}]}],
    [{"role": 5, "content": "x"}],
    [{"role": "wizard", "content": "x"}],
    [{"role": "user", "content": "x"}] * 2000,
    "x",
]


async def test_messages_that_are_none(http: httpx.AsyncClient) -> None:
    for messages in MESSAGES:
        answer = await http.post("/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == 400, messages
        assert answer.json()["error"]["param"].startswith("messages"), messages


async def test_prompts_that_are_none(http: httpx.AsyncClient) -> None:
    bad: list[Any] = ["", [], [[]], ["a", ""], ["a", 5], ["a", None], [5, "a"], ["a"] * 65, [["a"]]]
    for prompt in [*bad, [4096], [-1], [2**40], [1.5], [True], {}, 5, None]:
        answer = await http.post("/v1/completions", json={"prompt": prompt})
        assert answer.status_code == 400, prompt
        assert answer.json()["error"]["param"] == "prompt", prompt


async def test_text_parts_are_joined(http: httpx.AsyncClient, engine: Any) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "weft?"}]
    for content in (parts, "What is weft?"):
        await http.post(
            "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": content}]}
        )
    assert engine.submits[0].prompt_token_ids == engine.submits[1].prompt_token_ids


async def test_health_follows_the_engine(start_engine: Any, start_gateway: Any, settle: Any) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, http=parse_address("127.0.0.1:0"), engine_wait_seconds=0)
    async with httpx.AsyncClient(base_url=gateway.http_url) as client:
        assert (await client.get("/healthz")).status_code == 200
        await engine.die()
        await settle(lambda: not gateway.link.is_up)
        assert (await client.get("/healthz")).status_code == 503
        answer = await client.post("/v1/completions", json=TEXT)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1


async def test_metrics_are_exposed(http: httpx.AsyncClient) -> None:
    await http.post("/v1/completions", json=TEXT)
    text = (await http.get("/metrics")).text
    assert "weft_gateway_requests_begun_total 1.0" in text


async def test_a_reader_that_stops_pauses_its_slots(
    http: httpx.AsyncClient, gateway: Any, settle: Any
) -> None:
    link = gateway.application.router.links[0]
    address = gateway.application.http.address
    _, writer = await asyncio.open_connection(address.host, address.port, limit=1024)
    body = json.dumps(
        {**CHAT, "max_tokens": 1000, "n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}
    )
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
    )
    await settle(lambda: link.counters.pauses > 0, 20)
    assert link.num_live == 8
    writer.close()
    await settle(lambda: link.num_live == 0)


async def test_head_and_options(http: httpx.AsyncClient) -> None:
    for method, path, status in (
        ("HEAD", "/healthz", 200),
        ("HEAD", "/v1/models", 200),
        ("HEAD", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("OPTIONS", "/nothing", 404),
    ):
        answer = await http.request(method, path)
        assert answer.status_code == status, (method, path)
        if method == "HEAD":
            assert answer.content == b""
        if status == 405:
            assert answer.headers["allow"] == "POST"
