"""What an answer over HTTP comes to, event by event: foreign servers say what they like."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli.bench.http_connection import Origin, Pool
from cli.bench.http_parser import AnswerParser, HttpBroken
from cli.bench.http_transport import _Answer
from cli.bench.records import Record

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


def event(text: str, total: int | None = None, finish: str | None = None) -> bytes:
    document: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    if total is not None:
        document["usage"] = {"prompt_tokens": 3, "completion_tokens": total}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def answered(*events: bytes) -> Record:
    """The record of an answer whose events come one a millisecond."""
    parser, record = AnswerParser(), Record(0, 0, "measured", 0.0, 4, sent=0.1)
    answer = _Answer(record, 0.0)
    parser.feed(HEAD)
    for number, data in enumerate(events):
        for piece in parser.feed(data):
            answer.take(parser, piece, number * 1e-3)
    parser.ended()
    answer.finished(parser, 1.0)
    return record


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: \xff\xfe\n\n", b"data: 7\n\n"])
def test_an_event_that_is_no_object_is_the_servers_fault(data: bytes) -> None:
    with pytest.raises(HttpBroken, match="an event is no"):
        answered(event("a", 1), data)


def test_tokens_behind_the_last_text_are_counted() -> None:
    """Half a character in the middle, and an end token: in no message of their own, and yet sent."""
    record = answered(event("a", 1), event("", 2), event("b", 3), event("", 4, "length"), b"data: [DONE]\n\n")
    assert (record.outcome, list(record.times)) == ("ok", [0.0, 2e-3])
    assert list(record.counts) == [1, 3]
    assert record.num_tokens == 4


def test_usage_at_the_end_alone_says_nothing_of_messages() -> None:
    record = answered(event("a"), event("b"), event("", 5, "length"))
    assert (list(record.counts), record.has_counts, record.num_tokens) == ([0, 0], False, 5)


@pytest.mark.parametrize("error", [{"message": "gone", "code": "x"}, "gone"])
def test_an_error_in_the_stream_is_a_failure_whatever_follows(error: Any) -> None:
    data = b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
    record = answered(event("a", 1), data, event("", 1, "stop"), b"data: [DONE]\n\n")
    assert (record.outcome, record.status) == ("failed", "STREAM")
    assert "gone" in record.reason


async def test_a_connection_that_is_not_made_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as an answer that took too long, whose limit is another one."""
    import asyncio

    from cli.bench import http_connection

    async def never(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(600)

    monkeypatch.setattr(http_connection, "CONNECT_S", 0.01)
    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never, raising=False)
    with pytest.raises(ConnectionError, match=r"no connection within 0\.01 s"):
        await Pool(Origin("127.0.0.1", 1, "/v1", None, None)).take()
