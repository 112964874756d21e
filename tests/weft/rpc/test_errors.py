"""A status and its details fit into a trailer whatever they say, and a Failure event says the same."""

from __future__ import annotations

from base64 import b64encode
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from weft.rpc import errors
from weft.rpc.errors import StatusError


def big(field: str, description: str, count: int = 500) -> StatusError:
    return StatusError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "m" * 10_000,
        field_violations=[(field, description)] * count,
        retry_after_s=3,
        reason="R",
        metadata={"file": "f" * 5_000},
    )


@pytest.mark.parametrize("text", ["x" * 10_000, "\U0001f600" * 5_000, "\ud800" * 300, "", "é" * 100])
def test_details_stay_below_the_cap(text):
    error = big(text, text)
    status = errors.rich_status(error)
    assert status.ByteSize() <= errors.MAX_DETAILS_BYTES
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    assert 1 <= len(bad_request.field_violations) <= errors.MAX_FIELD_VIOLATIONS


@pytest.mark.parametrize("text", ["x" * 10_000, "\U0001f600" * 5_000, "\ud800" * 300, "é" * 5_000])
def test_all_trailers_together_stay_below_what_any_peer_takes(text):
    """8 KiB is where peers with default settings begin to refuse; beyond ASCII a message is sent as %XX."""
    error = big(text, text)
    error.message = text
    size = len(quote(errors.status_message(error)))
    for key, value in errors.trailers(error):
        size += len(key) + len(b64encode(value) if isinstance(value, bytes) else value)
    assert size < 8_000
    assert len(errors.status_message(error)) > 100


def test_the_first_violation_is_in_the_message():
    error = errors.invalid_argument([("a", "is bad"), ("b", "too"), ("c", "too")])
    assert error.message == "a: is bad (and 2 more)"
    assert errors.invalid_argument([("a", "is bad")]).message == "a: is bad"
    with pytest.raises(ValueError, match="violation"):
        errors.invalid_argument([])


def test_the_pushback_trailer():
    error = StatusError(grpc.StatusCode.UNAVAILABLE, "later", retry_after_s=0.0001)
    found = dict(errors.trailers(error))
    assert found["grpc-retry-pushback-ms"] == "1"
    status = status_pb2.Status.FromString(found["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1
    assert dict(errors.trailers(StatusError(grpc.StatusCode.NOT_FOUND, "no"))) == {}
    huge = StatusError(grpc.StatusCode.UNAVAILABLE, "later", retry_after_s=1e12)
    assert int(dict(errors.trailers(huge))["grpc-retry-pushback-ms"]) == 2**31 - 1


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c.name not in ("OK", "UNKNOWN")])
def test_a_failure_event_and_back(code):
    error = StatusError(code, "why", field_violations=[("f", "d")], retry_after_s=1.5, error_id="id")
    back = errors.error_from_failure(errors.failure_from(error))
    assert (back.code, back.message, back.field_violations) == (code, "why", (("f", "d"),))
    assert (back.retry_after_s, back.error_id) == (1.5, "id")


@pytest.mark.parametrize("number", [0, 2, 17, 99, 2**32 - 1])
def test_no_failure_becomes_ok_or_unknown(number):
    assert errors.status_code(number) is grpc.StatusCode.INTERNAL
