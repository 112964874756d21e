"""The headers that tell a key how much it has left."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from services.gateway.admission.quotas import QuotaState
from services.gateway.http.rate_limits import rate_limit_headers
from weft.rpc.address import parse_address


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, b"0ms"), (0.12, b"120ms"), (1.4, b"1s"), (60.0, b"1m0s"), (3599.6, b"60m0s")]
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: bytes) -> None:
    headers = dict(rate_limit_headers({"requests": QuotaState(5, 4.9, seconds)}))
    assert headers == {
        b"x-ratelimit-limit-requests": b"5",
        b"x-ratelimit-remaining-requests": b"4",
        b"x-ratelimit-reset-requests": text,
    }


@pytest.mark.parametrize("is_stream", [False, True])
async def test_answers_say_what_is_left(start_gateway: Any, engine: Any, is_stream: bool) -> None:
    gateway = await start_gateway(
        engine,
        http=parse_address("127.0.0.1:0"),
        key_requests_per_second=0.05,
        key_tokens_per_minute=600.0,
    )
    body = {"model": "demo", "prompt": "Hi", "max_tokens": 50, "stream": is_stream}
    async with httpx.AsyncClient(base_url=gateway.http_url) as client:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "1"
        assert answer.headers["x-ratelimit-limit-tokens"] == "600"
        assert 540 <= int(answer.headers["x-ratelimit-remaining-tokens"]) < 600
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(answer.headers["retry-after-ms"]) <= 20_000


async def test_no_limit_no_headers(gateway: Any) -> None:
    async with httpx.AsyncClient(base_url=gateway.http_url) as client:
        answer = await client.post("/v1/completions", json={"model": "demo", "prompt": "Hi", "max_tokens": 5})
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
