"""What every request must be before any path is looked at: HTTP/1, few headers, a length that is said once.

Two ways of telling where a body ends are how one request is smuggled behind another, so a request with both
is refused and its connection ends. Knows no path and no body.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from services.gateway.http.errors import HttpError, body_of, encode, headers_of

MAX_HEADERS = 100
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application in front of another one."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        error = problem_of(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        body = encode(body_of(error))
        headers = [
            *headers_of(error),
            (b"connection", b"close"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def problem_of(scope: Scope) -> HttpError | None:
    """Why a request is refused whatever it asks for, or None."""
    if scope["http_version"] not in ("1.0", "1.1"):
        return HttpError(505, "HTTP/1.1 is spoken here", code="http_version")
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > MAX_HEADERS:
        return HttpError(431, f"more than {MAX_HEADERS} headers", code="too_many_headers")
    names = [name for name, _ in headers]
    if b"transfer-encoding" in names and (b"content-length" in names or scope["http_version"] == "1.0"):
        return HttpError(400, "the length of the body is said in two ways", code="ambiguous_length")
    return None
