"""What bad input gets over HTTP: the right status and an error body, and the server goes on."""

from __future__ import annotations

import asyncio
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
