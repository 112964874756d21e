"""How a client names what it wants to go on with, and what is kept of a request that has ended.

Pure but for the clock of what is kept. Knows neither engines nor the network.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from services.gateway.streams.live import LiveRequest
from services.gateway.streams.orphans import Retention
from weft.rpc.errors import RESUME_TOKEN, StatusError, invalid_argument
from weft.sampling import validate_labels
from weft.v1 import gateway_service_pb2 as gateway_pb

MAX_TOKEN_CHARS = 128
# Errors after which a request that has given output is kept, whether it was resumable or not: no engine to go
# on with now, this gateway's end, a reader that did not read.
RESUMED_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED})
Key = tuple[str | None, str]

_RESUME_FIELDS = ("request_id", "resumable", "resume_offset", "resume_offsets", "resume_token")


def body_of(request: gateway_pb.GenerateRequest) -> gateway_pb.GenerateRequest:
    """The request without the fields that say who it is and where to go on."""
    body = gateway_pb.GenerateRequest()
    body.CopyFrom(request)
    for name in _RESUME_FIELDS:
        body.ClearField(name)
    return body


def digest_of(request: gateway_pb.GenerateRequest) -> bytes:
    """What two calls must have in common to be one request."""
    data = body_of(request).SerializeToString(deterministic=True)
    return hashlib.blake2b(data, digest_size=16).digest()


def has_offsets(request: gateway_pb.GenerateRequest) -> bool:
    """Whether a place to go on is named."""
    return request.HasField("resume_offset") or bool(request.resume_offsets)


def is_about_resuming(request: gateway_pb.GenerateRequest) -> bool:
    """Whether the request may outlive its call, or goes on with one that did."""
    return request.resumable or bool(request.resume_token) or has_offsets(request)


def check_resume_fields(request: gateway_pb.GenerateRequest) -> None:
    """What can be said without looking anything up. Raises StatusError."""
    violations: list[tuple[str, str]] = []
    if request.resume_token:
        if len(request.resume_token) > MAX_TOKEN_CHARS:
            violations.append(("resume_token", f"must have at most {MAX_TOKEN_CHARS} characters"))
        if request.resumable:
            violations.append(("resumable", "a request that is taken up by its token stays what it was"))
        if has_offsets(request):
            violations.append((_offset_field(request), "the resume token stands for it"))
    elif not request.request_id:
        field_name = "resumable" if request.resumable else _offset_field(request)
        violations.append((field_name, "needs a request_id"))
    if request.HasField("resume_offset") and request.resume_offsets:
        violations.append(("resume_offsets", "not together with resume_offset"))
    violations += validate_labels(request_id=request.request_id, priority=0, cache_salt="")
    if violations:
        raise invalid_argument(violations)


def _offset_field(request: gateway_pb.GenerateRequest) -> str:
    return "resume_offset" if request.HasField("resume_offset") else "resume_offsets"


def places(request: gateway_pb.GenerateRequest, live: LiveRequest) -> list[tuple[int, int]]:
    """The place of each sample at which the reader wants to go on: tokens and offset. Raises StatusError."""
    num_samples = len(live.samples)
    offsets = list(request.resume_offsets)
    name = _offset_field(request)
    if request.HasField("resume_offset"):
        offsets = [request.resume_offset]
    elif not offsets:
        return [(0, 0)] * num_samples
    if len(offsets) != num_samples:
        raise invalid_argument([(name, f"the request has {num_samples} samples: one offset for each")])
    found: list[tuple[int, int]] = []
    for sample, offset in zip(live.samples, offsets, strict=True):
        num_tokens = sample.journal.tokens_at(offset)
        if num_tokens is None:
            text = f"sample {sample.index}: {offset} was never sent as next_offset"
            raise StatusError(
                grpc.StatusCode.OUT_OF_RANGE,
                f"{name}: {text}",
                field_violations=[(name, text)],
                reason="RESUME_OFFSET_UNKNOWN",
            )
        found.append((num_tokens, offset))
    return found


def last_places(live: LiveRequest) -> list[tuple[int, int]]:
    """After the last byte of each sample that was on its way to the reader."""
    return [(sample.journal.num_sent, sample.journal.sent_offset) for sample in live.samples]


def body_differs() -> StatusError:
    """Another request has this id."""
    return StatusError(
        grpc.StatusCode.ALREADY_EXISTS,
        "another request has this id",
        reason="REQUEST_ID_IN_USE",
    )


def not_kept(what: str) -> StatusError:
    """Never there, another key's, or its time is over: no difference is made."""
    return StatusError(
        grpc.StatusCode.NOT_FOUND, f"{what}: nothing is kept under it", reason="REQUEST_NOT_FOUND"
    )


@dataclass(eq=False, slots=True)
class Remnant:
    """A request that has ended, as it was then. `token` and, when it was resumable, its id lead to it."""

    key: Key
    digest: bytes
    live: LiveRequest
    forget: Callable[[Remnant], None]
    # 256 bits: nobody guesses it, and it is good for the same key only.
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        return self.live.num_bytes

    def expire(self) -> None:
        """Nobody came for it in time."""
        self.forget(self)


class Remnants:
    """The ended requests that are kept, by token and by id. One id leads to the one that ended last."""

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._by_token: dict[str, Remnant] = {}
        self._by_key: dict[Key, Remnant] = {}

    def __len__(self) -> int:
        return len(self._by_token)

    def keep(self, key: Key, digest: bytes, live: LiveRequest) -> Remnant | None:
        """Keep a request that has just ended. None when there is no room for it."""
        remnant = Remnant(key, digest, live, self._forget)
        if live.is_resumable:
            self._by_key[key] = remnant
        live.forget_call()
        self._by_token[remnant.token] = remnant
        self._retention.keep(remnant)
        return remnant if remnant.token in self._by_token else None

    def drop(self, remnant: Remnant) -> None:
        """Keep it no longer."""
        self._retention.release(remnant)
        self._forget(remnant)

    def by_key(self, key: Key) -> Remnant | None:
        """The one of a resumable request."""
        return self._by_key.get(key)

    def by_token(self, owner: str | None, token: str) -> Remnant | None:
        """The one that a token stands for, if it is this key's."""
        remnant = self._by_token.get(token)
        return remnant if remnant is not None and remnant.key[0] == owner else None

    def _forget(self, remnant: Remnant) -> None:
        self._by_token.pop(remnant.token, None)
        if self._by_key.get(remnant.key) is remnant:
            del self._by_key[remnant.key]


def check_token_body(request: gateway_pb.GenerateRequest, remnant: Remnant) -> None:
    """With a token the body may be left out; when it is there it must be the same. Raises StatusError."""
    if request.request_id and request.request_id != remnant.key[1]:
        raise invalid_argument([("request_id", "is not that of the resume token")])
    if body_of(request).ByteSize() and digest_of(request) != remnant.digest:
        raise body_differs()


def with_token(error: StatusError, token: str) -> StatusError:
    """The same error with a resume token in it."""
    return StatusError(
        error.code,
        error.message,
        field_violations=error.field_violations,
        retry_after_s=error.retry_after_s,
        error_id=error.error_id,
        reason=error.reason,
        metadata={**error.metadata, RESUME_TOKEN: token},
    )


def offsets_are_zero(request: gateway_pb.GenerateRequest) -> bool:
    """Whether the reader wants all from the beginning."""
    offsets: Sequence[int] = request.resume_offsets
    return not request.resume_offset and not any(offsets)
