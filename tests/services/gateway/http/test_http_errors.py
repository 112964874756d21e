"""Errors as HTTP clients read them: when to come back, and how to take a broken stream up again."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import httpx
import pytest

from services.gateway.http.errors import HttpError, body_of, headers_of, status_of
from weft.rpc.address import parse_address
from weft.rpc.errors import RESUME_TOKEN, StatusError

C = grpc.StatusCode
TEXT: dict[str, Any] = {"model": "demo", "prompt": "hi", "max_tokens": 900, "seed": 1, "ignore_eos": True}


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (StatusError(C.RESOURCE_EXHAUSTED, "x", retry_after_s=0.2), 429, "1"),
        (StatusError(C.RESOURCE_EXHAUSTED, "x", retry_after_s=2.5), 429, "3"),
        (StatusError(C.RESOURCE_EXHAUSTED, "x"), 413, None),
        (StatusError(C.UNAVAILABLE, "x"), 503, "1"),
        (StatusError(C.UNAVAILABLE, "x", retry_after_s=7.0), 503, "7"),
        (StatusError(C.ABORTED, "x"), 409, None),
        (StatusError(C.INTERNAL, "x"), 500, None),
        (StatusError(C.UNKNOWN, "x"), 500, None),
        (HttpError(503, "x"), 503, "1"),
        (HttpError(413, "x"), 413, None),
    ],
    ids=str,
)
def test_when_to_come_back(error: Any, status: int, retry_after: str | None) -> None:
    headers = {name.decode(): value.decode() for name, value in headers_of(error)}
    assert status_of(error) == status
    assert headers.get("retry-after") == retry_after
    assert ("retry-after-ms" in headers) == (retry_after is not None)


def test_a_token_to_resume_with_is_in_the_body() -> None:
    error = StatusError(C.UNAVAILABLE, "x", reason="ENGINE_LOST", metadata={RESUME_TOKEN: "t0k"})
    assert body_of(error)["error"]["resume_token"] == "t0k"
    assert "resume_token" not in body_of(StatusError(C.UNAVAILABLE, "x"))["error"]
    assert "resume_token" not in body_of(HttpError(400, "x"))["error"]


async def test_a_stream_that_breaks_ends_with_an_error_and_no_done(
    start_engine: Any, start_gateway: Any
) -> None:
    """The gateway's error carries a token of what was delivered; the whole of it is in the last event."""
    engine = await start_engine()
    gateway = await start_gateway(engine, http=parse_address("127.0.0.1:0"), engine_wait_seconds=0)
    events: list[str] = []
    async with httpx.AsyncClient(base_url=gateway.http_url, timeout=20) as client:
        async with client.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as answer:
            assert answer.status_code == 200
            death: asyncio.Task[None] | None = None
            async for line in answer.aiter_lines():
                if not line:
                    continue
                events.append(line.removeprefix("data: "))
                death = death or asyncio.create_task(engine.die())
            assert death is not None
            await death
    assert "[DONE]" not in events
    error = json.loads(events[-1])["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")
    assert error["resume_token"]
