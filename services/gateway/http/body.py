"""A request's body: read with caps on size and time, parsed strictly. Knows no field."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from services.gateway.http.errors import HttpError
from services.gateway.text import strict_json
from weft.limits import DEFAULT_LIMITS

BODY_S = 10.0
# Above it, parsing would hold the event loop for more than a few milliseconds.
INLINE_BYTES = 128 << 10
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Disconnected(Exception):
    """The client is gone."""


async def read_object(
    scope: Scope, receive: Receive, *, body_s: float = BODY_S, max_bytes: int = DEFAULT_LIMITS.max_body_bytes
) -> dict[str, Any]:
    """The JSON object that the client sent within `body_s` seconds. Raises HttpError, and Disconnected."""
    _check_headers(scope, max_bytes)
    try:
        async with asyncio.timeout(body_s):
            data = await _read(receive, max_bytes)
    except TimeoutError:
        raise HttpError(408, f"the body did not come within {body_s:g} s") from None
    try:
        if len(data) <= INLINE_BYTES:
            document = strict_json.parse(data)
        else:
            document = await asyncio.to_thread(strict_json.parse, data)
    except strict_json.StrictJsonError as error:
        raise HttpError(
            400, f"the body is no JSON that can be trusted: {error}", code="invalid_json"
        ) from None
    if not isinstance(document, dict):
        raise HttpError(400, "the body must be a JSON object", code="invalid_json")
    return document


def _check_headers(scope: Scope, max_bytes: int) -> None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() != b"identity":
            raise HttpError(415, "compressed requests are not taken", code="unsupported_encoding")
        if name == b"content-type":
            kind, _, parameters = value.decode("latin-1").lower().partition(";")
            charset = parameters.strip().removeprefix("charset=").strip('"')
            if kind.strip() != "application/json" or charset not in ("", "utf-8", "utf8"):
                raise HttpError(415, "the content type must be application/json", code="unsupported_type")
        if name == b"content-length" and int(value) > max_bytes:
            raise _too_large(max_bytes)


async def _read(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")
