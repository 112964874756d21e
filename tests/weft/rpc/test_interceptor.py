"""What the interceptor makes of every way a call can end, for all four kinds of call."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from tests.weft.rpc.probe_service import KINDS, SERVICE, Probe, call_kind, eventually
from weft import logs
from weft.rpc import errors
from weft.rpc.interceptor import request_id_in

HELLO = Probe(service="hello").SerializeToString()


async def failed_call(channel: Any, kind: str, *payloads: bytes, **kwargs: Any) -> errors.StatusError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_kind(channel, kind, *(payloads or (HELLO,)), **kwargs)
    return errors.error_from_call(caught.value)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_that_works_is_counted_as_ok(probe_server, probe_channel, kind):
    replies = await call_kind(probe_channel, kind, HELLO)
    assert replies[-1].service in ("hello", "done")
    await asyncio.sleep(0.05)
    assert probe_server.counters.by_code == {"OK": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_a_status_error_leaves_as_its_status(probe_service, probe_channel, kind, code):
    def fail(name: str) -> None:
        raise errors.StatusError(
            code, "so it is", field_violations=[("a.b", "is bad")], retry_after_s=1.25, reason="WHY"
        )

    probe_service.act = fail
    error = await failed_call(probe_channel, kind)
    assert (error.code, error.message) == (code, "so it is")
    assert error.field_violations == (("a.b", "is bad"),)
    assert (error.retry_after_s, error.reason) == (1.25, "WHY")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unknown_exception_leaves_as_internal_with_an_id_and_nothing_else(
    probe_service, probe_channel, kind, caplog
):
    def fail(name: str) -> None:
        raise RuntimeError("secret path /etc/shadow")

    probe_service.act = fail
    with caplog.at_level(logging.ERROR, logger="weft"):
        error = await failed_call(probe_channel, kind)
    assert error.code is grpc.StatusCode.INTERNAL
    assert error.error_id
    assert error.error_id in error.message
    assert "secret" not in error.message
    stacks = [record for record in caplog.records if record.exc_info]
    assert len(stacks) == 1
    assert dict(stacks[0].weft_fields)["error_id"] == error.error_id


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "payload", [b"\xff\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x05ab", b"\x0b" * 150], ids=repr
)
async def test_bytes_that_are_no_message_are_an_invalid_argument(probe_channel, kind, payload):
    error = await failed_call(probe_channel, kind, payload)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.field_violations[0][0] == "request"


async def test_bytes_that_are_no_message_end_a_stream_that_worked_before(probe_channel):
    error = await failed_call(probe_channel, "stream_stream", HELLO, b"\xff")
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("kind", KINDS)
async def test_an_empty_message_is_a_message(probe_channel, kind):
    assert await call_kind(probe_channel, kind, b"")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cancelled_call_runs_the_handlers_finally(probe_server, probe_service, probe_channel, kind):
    probe_service.act = lambda name: asyncio.sleep(60)
    task = asyncio.ensure_future(call_kind(probe_channel, kind, HELLO))
    await probe_service.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not probe_service.num_live and probe_server.counters.ended)
    assert probe_server.counters.by_code == {"CANCELLED": 1}


async def test_a_reader_that_leaves_while_a_write_waits_ends_the_handler(probe_service, probe_channel):
    call = probe_channel.unary_stream("/test.v1.ProbeService/unary_stream", None, Probe.FromString)(
        Probe(service="forever").SerializeToString()
    )
    await call.read()
    await asyncio.sleep(0.3)  # flow control has stopped the writer by now
    assert probe_service.num_live == 1
    call.cancel()
    await eventually(lambda: not probe_service.num_live)


async def test_an_expired_deadline_ends_the_handler(probe_service, probe_channel):
    probe_service.act = lambda name: asyncio.sleep(60)
    error = await failed_call(probe_channel, "unary_unary", seconds=0.2)
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: not probe_service.num_live)


async def test_an_answer_of_the_wrong_type_is_internal(probe_server, probe_channel):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await probe_channel.unary_unary(f"/{SERVICE}/wrong")(HELLO)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "SerializeToString" not in caught.value.details()


@pytest.mark.parametrize("method", ["/test.v1.ProbeService/Nope", "/no.Such/Nope"])
async def test_an_unknown_method_is_unimplemented(probe_channel, method):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await probe_channel.unary_unary(method)(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("size", [17_000, 20_480, 200_000])
async def test_metadata_over_the_cap_is_resource_exhausted(probe_channel, size):
    for _ in range(5):
        error = await failed_call(probe_channel, "unary_unary", metadata=(("x-big", "a" * size),))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_s is None
    assert await call_kind(probe_channel, "unary_unary", HELLO, metadata=(("x-big", "a" * 8_000),))


async def test_a_request_id_is_taken_over_or_made(probe_channel):
    method = probe_channel.unary_unary("/test.v1.ProbeService/unary_unary")
    call = method(HELLO, metadata=(("x-request-id", "abc-1"),))
    assert dict(await call.trailing_metadata())["x-request-id"] == "abc-1"
    call = method(HELLO, metadata=(("x-request-id", "a b"),))
    assert len(dict(await call.trailing_metadata())["x-request-id"]) == 32


@pytest.mark.parametrize("value", ["", "a" * 129, "a/b", "a\nb", "ä"])
def test_a_malformed_request_id_is_replaced(value):
    assert request_id_in([("x-request-id", value)]) != value
    assert request_id_in([("x-request-id", "a" * 128)]) == "a" * 128


async def test_the_request_id_is_in_every_log_line_of_the_call(probe_service, probe_channel):
    seen: list[str | None] = []
    probe_service.act = lambda name: seen.append(logs.request_id.get())
    await call_kind(probe_channel, "unary_unary", HELLO, metadata=(("x-request-id", "one"),))
    await call_kind(probe_channel, "unary_stream", HELLO, metadata=(("x-request-id", "two"),))
    assert seen == ["one", "two"]
