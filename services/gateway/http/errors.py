"""Statuses as OpenAI-compatible clients read them: an HTTP status and a body with `error`."""

from __future__ import annotations

import json
import math
import re

import grpc

from weft.rpc.errors import StatusError

_Code = grpc.StatusCode
# code: (HTTP status, type, code in the body)
_TABLE: dict[grpc.StatusCode, tuple[int, str, str | None]] = {
    _Code.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    _Code.FAILED_PRECONDITION: (400, "invalid_request_error", "exceeds_capacity"),
    _Code.OUT_OF_RANGE: (400, "invalid_request_error", None),
    _Code.UNAUTHENTICATED: (401, "invalid_request_error", "invalid_api_key"),
    _Code.PERMISSION_DENIED: (403, "invalid_request_error", "permission_denied"),
    _Code.NOT_FOUND: (404, "invalid_request_error", "model_not_found"),
    _Code.ALREADY_EXISTS: (409, "invalid_request_error", "already_exists"),
    _Code.ABORTED: (409, "server_error", "aborted"),
    _Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    _Code.CANCELLED: (499, "server_error", "cancelled"),
    _Code.UNIMPLEMENTED: (501, "invalid_request_error", "not_implemented"),
    _Code.UNAVAILABLE: (503, "server_error", "unavailable"),
    _Code.DEADLINE_EXCEEDED: (504, "server_error", "deadline_exceeded"),
}
# When to come back after a 429 or 503 that does not say it itself, in seconds.
DEFAULT_RETRY_S = 1.0
_INTERNAL = (500, "server_error", "internal_error")
_PREFIXES = re.compile(r"^(sampling\.|chat\.)")


class HttpError(Exception):
    """A request that HTTP itself refuses, before there is anything to generate."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


def bad_request(param: str, message: str, *, code: str | None = None) -> HttpError:
    """400 naming the parameter."""
    return HttpError(400, f"{param}: {message}", param=param, code=code)


def parameter_of(field: str) -> str:
    """A field's path as the HTTP client wrote it."""
    if re.match(r"(text|token_ids)\b", field):
        return "prompt"
    return _PREFIXES.sub("", field)


def body_of(error: StatusError | HttpError) -> dict[str, dict[str, object]]:
    """The `error` object. One that a client can take up again has a `resume_token`."""
    if isinstance(error, HttpError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return _body(error.message, kind, error.param, error.code)
    _, kind, code = _TABLE.get(error.code, _INTERNAL)
    message, param = error.message, None
    if error.field_violations:
        field, description = error.field_violations[0]
        param = parameter_of(field)
        more = len(error.field_violations) - 1
        message = f"{param}: {description}" + (f" (and {more} more)" if more else "")
    if error.reason == "CONTEXT_LENGTH_EXCEEDED":
        code = "context_length_exceeded"
    body = _body(message, kind, param, code)
    if token := error.metadata.get("resume_token"):
        body["error"]["resume_token"] = token
    return body


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, dict[str, object]]:
    return {"error": {"message": message[:1000], "type": kind, "param": param, "code": code}}


def status_of(error: StatusError | HttpError) -> int:
    """The HTTP status. A size limit has no time to come back, and is 413."""
    if isinstance(error, HttpError):
        return error.status
    if error.code is _Code.RESOURCE_EXHAUSTED and error.retry_after_s is None:
        return 413
    return _TABLE.get(error.code, _INTERNAL)[0]


def headers_of(error: StatusError | HttpError) -> list[tuple[bytes, bytes]]:
    """Headers beside the body."""
    headers = [(b"content-type", b"application/json")]
    if isinstance(error, HttpError) and error.status == 408:
        headers.append((b"connection", b"close"))  # what is left of the body is not waited for
    wait_s = None if isinstance(error, HttpError) else error.retry_after_s
    if status_of(error) in (429, 503) and wait_s is None:
        wait_s = DEFAULT_RETRY_S
    if wait_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(wait_s))).encode()))
        headers.append((b"retry-after-ms", str(max(1, round(wait_s * 1000))).encode()))
    if status_of(error) == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def encode(document: object) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
