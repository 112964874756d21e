"""Errors that carry a gRPC status, and their two forms on the wire.

A `StatusError` leaves a call as its status with google.rpc details, or leaves a stream as a
`weft.v1.Failure` event. Both come from the same object, so both say the same. Knows no service.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from weft.v1 import generation_pb2 as pb

# A status larger than the peer's metadata limit reaches it as RESOURCE_EXHAUSTED: its own code is lost.
# Peers with default settings begin to refuse at 8 KiB over all trailers.
MAX_DETAILS_BYTES = 4096
MAX_FIELD_VIOLATIONS = 20
MAX_MESSAGE_CHARS = 400
# On the wire each byte beyond ASCII takes three, so that length in characters is not enough.
MAX_MESSAGE_BYTES = 600
MAX_FIELD_CHARS = 100
MAX_DESCRIPTION_CHARS = 200
ERROR_DOMAIN = "weft.v1"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# In ErrorInfo.metadata, and as a trailer that any client can read.
RESUME_TOKEN = "resume_token"
RESUME_TOKEN_KEY = "x-resume-token"

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class StatusError(Exception):
    """A request that ends with a gRPC status. Everything in it is safe to show to the caller.

    `field_violations` are (field, description) pairs; the first is repeated in the message of the status.
    `retry_after_s` says when to try again. `error_id` finds the stack in the log. `reason`, UPPER_SNAKE, and
    `metadata` become google.rpc.ErrorInfo.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        field_violations: Sequence[tuple[str, str]] = (),
        retry_after_s: float | None = None,
        error_id: str | None = None,
        reason: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field_violations = tuple(field_violations)
        self.retry_after_s = retry_after_s
        self.error_id = error_id
        self.reason = reason
        self.metadata = dict(metadata or {})


def invalid_argument(violations: Sequence[tuple[str, str]]) -> StatusError:
    """INVALID_ARGUMENT for one or more bad fields. Raises ValueError when there is none to name."""
    if not violations:
        raise ValueError("an invalid argument needs a field violation")
    field, description = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return StatusError(
        grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {description}{more}", field_violations=violations
    )


def new_error_id() -> str:
    """An id that joins what the client saw with what the log holds."""
    return uuid.uuid4().hex[:16]


def internal_error(error_id: str) -> StatusError:
    """INTERNAL with nothing but an id: what happened is in the log under it."""
    return StatusError(grpc.StatusCode.INTERNAL, f"internal error, id {error_id}", error_id=error_id)


def clip(text: str, limit: int) -> str:
    """The text cut to `limit` characters and made encodable, since it goes into a trailer."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _details(error: StatusError) -> list[Message]:
    """The google.rpc details, in order of importance."""
    details: list[Message] = []
    if error.error_id or error.reason:
        info = error_details_pb2.ErrorInfo(reason=error.reason or "INTERNAL", domain=ERROR_DOMAIN)
        for key, value in error.metadata.items():
            info.metadata[key] = clip(value, MAX_DESCRIPTION_CHARS)
        if error.error_id:
            info.metadata["error_id"] = error.error_id
        details.append(info)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(retry_after_ms(error))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.field_violations:
        bad_request = error_details_pb2.BadRequest()
        for field, description in error.field_violations[:MAX_FIELD_VIOLATIONS]:
            bad_request.field_violations.add(
                field=clip(field, MAX_FIELD_CHARS), description=clip(description, MAX_DESCRIPTION_CHARS)
            )
        details.append(bad_request)
    return details


def retry_after_ms(error: StatusError) -> int:
    """The pushback in whole milliseconds: at least 1 when there is one, else 0."""
    if error.retry_after_s is None:
        return 0
    return min(max(1, round(error.retry_after_s * 1000)), 2**31 - 1)


def status_message(error: StatusError) -> str:
    """What goes into the message of the status."""
    text = clip(error.message, MAX_MESSAGE_CHARS)
    data = text.encode()
    if len(data) <= MAX_MESSAGE_BYTES:
        return text
    return data[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."


def rich_status(error: StatusError) -> status_pb2.Status:
    """The google.rpc.Status of an error, at most `MAX_DETAILS_BYTES` long: the last violations go first."""
    status = status_pb2.Status(code=error.code.value[0], message=status_message(error))
    for detail in _details(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        room = MAX_DETAILS_BYTES - status.ByteSize() - 8
        while packed.ByteSize() > room and isinstance(detail, error_details_pb2.BadRequest):
            if not detail.field_violations:
                break
            del detail.field_violations[-1]
            packed.Pack(detail)
        if packed.ByteSize() <= room:
            status.details.append(packed)
    return status


def trailers(error: StatusError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of an error: the details, and the pushback that retrying clients obey."""
    status = rich_status(error)
    found: list[tuple[str, str | bytes]] = []
    if status.details:
        found.append((STATUS_DETAILS_KEY, status.SerializeToString()))
    if error.retry_after_s is not None:
        found.append((PUSHBACK_KEY, str(retry_after_ms(error))))
    if token := error.metadata.get(RESUME_TOKEN):
        found.append((RESUME_TOKEN_KEY, token))
    return tuple(found)


def failure_from(error: StatusError) -> pb.Failure:
    """The same error as an event inside a stream."""
    failure = pb.Failure(
        code=error.code.value[0],
        message=status_message(error),
        retry_after_ms=retry_after_ms(error),
        error_id=error.error_id or "",
        reason=error.reason or "",
        resume_token=error.metadata.get(RESUME_TOKEN, ""),
    )
    for field, description in error.field_violations[:MAX_FIELD_VIOLATIONS]:
        failure.field_violations.add(
            field=clip(field, MAX_FIELD_CHARS), description=clip(description, MAX_DESCRIPTION_CHARS)
        )
    return failure


def status_code(number: int) -> grpc.StatusCode:
    """The code of a number off the wire. OK, UNKNOWN and what is no code become INTERNAL: none of them is
    sent.
    """
    code = _CODES.get(number, grpc.StatusCode.INTERNAL)
    return grpc.StatusCode.INTERNAL if code in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN) else code


def error_from_failure(failure: pb.Failure) -> StatusError:
    """The error that a `Failure` event reports."""
    return StatusError(
        status_code(failure.code),
        failure.message,
        field_violations=[(v.field, v.description) for v in failure.field_violations],
        retry_after_s=failure.retry_after_ms / 1000 if failure.retry_after_ms else None,
        error_id=failure.error_id or None,
        reason=failure.reason or None,
        metadata={RESUME_TOKEN: failure.resume_token} if failure.resume_token else None,
    )


def error_from_call(call: Any) -> StatusError:
    """The error that a failed client call (an AioRpcError, or the RpcError of a call with threads) reports,
    details included when they can be read.
    """
    error = StatusError(call.code(), call.details() or "")
    metadata: Any = call.trailing_metadata() or ()
    for key, value in metadata:
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                _read_details(error, status_pb2.Status.FromString(value))
            except DecodeError:
                break
    return error


def _read_details(error: StatusError, status: status_pb2.Status) -> None:
    for packed in status.details:
        bad_request, retry, info = (
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.ErrorInfo(),
        )
        if packed.Unpack(bad_request):
            error.field_violations = tuple((v.field, v.description) for v in bad_request.field_violations)
        elif packed.Unpack(retry):
            error.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
        elif packed.Unpack(info):
            error.reason = info.reason
            error.metadata = {key: value for key, value in info.metadata.items() if key != "error_id"}
            error.error_id = info.metadata.get("error_id") or None
