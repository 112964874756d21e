"""The list's JSON cases over HTTP, on both routes: status, error type, the parameter that is named."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.hostile.hostile_stack import Stack
from tests.hostile.http_cases import HTTP, HttpCase

pytestmark = pytest.mark.asyncio(loop_scope="module")
JSON = {"content-type": "application/json"}


def check_error(answer: httpx.Response, status: int, param: str | None, code: str | None) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(answer.content) < 4096
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error


@pytest.mark.parametrize(
    ("route", "case"),
    [(route, case) for case in HTTP for route in case.routes],
    ids=lambda value: value.id if isinstance(value, HttpCase) else value.rsplit("/", 2)[-2],
)
async def test_body(stack: Stack, http: httpx.AsyncClient, route: str, case: HttpCase) -> None:
    data = case.data(route)
    async with stack.watched():
        answer = await http.post(route, content=data, headers=JSON)
    if case.status != 200:
        check_error(answer, case.status, case.param, case.code)
        return
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert all(choice["finish_reason"] for choice in document["choices"])
    assert len(document["choices"]) == json.loads(data).get("n", 1)


async def test_H060_no_address_is_opened(
    stack: Stack, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever addresses a conversation holds, only the test's own client connects to anything."""
    import socket

    seen: list[Any] = []
    connect = socket.socket.connect

    def noted(self: socket.socket, address: Any) -> None:
        seen.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    for url in ("http://169.254.169.254/", "file:///etc/passwd"):
        content = [{"type": "text", "text": f"![x]({url})"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
    assert all(address[:2] == tuple(stack.http) for address in seen), seen
