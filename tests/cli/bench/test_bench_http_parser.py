"""Answers out of bytes, however they are cut."""

from __future__ import annotations

import itertools
import random

import pytest

from cli.bench.http_parser import AnswerParser, EventParser, HttpBroken

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\nTrailer: x\r\n\r\n"


def read(data: bytes, cuts: list[int]) -> tuple[AnswerParser, bytes]:
    parser, body = AnswerParser(), b""
    places = [0, *sorted(cuts), len(data)]
    for start, end in itertools.pairwise(places):
        body += b"".join(parser.feed(data[start:end]))
    return parser, body


def test_chunks_wherever_they_are_cut() -> None:
    data = HEAD + CHUNKS
    for cut in range(len(data)):
        parser, body = read(data, [cut])
        assert (body, parser.is_done, parser.status) == (b"hello, world", True, 200), cut
    rng = random.Random(1)
    for _ in range(200):
        parser, body = read(data, rng.sample(range(len(data)), 12))
        assert (body, parser.is_done) == (b"hello, world", True)
    assert parser.headers["content-type"] == "text/event-stream"
    assert parser.is_keeping_alive


def test_counted_bodies_empty_ones_and_hints() -> None:
    parser, body = read(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 No\r\ncontent-length: 3\r\n\r\nabc", [30])
    assert (parser.status, body, parser.is_done) == (429, b"abc", True)
    parser, body = read(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", [])
    assert (parser.is_done, parser.is_keeping_alive) == (True, False)


def test_a_body_may_end_with_the_connection_but_no_other_may() -> None:
    parser, body = read(b"HTTP/1.1 200 OK\r\n\r\nabc", [])
    assert not parser.is_done
    parser.ended()
    assert parser.is_done
    assert body == b"abc"
    assert not parser.is_keeping_alive
    for data in (b"", HEAD, HEAD + b"5\r\nhel", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc"):
        parser, _ = read(data, [])
        with pytest.raises(HttpBroken):
            parser.ended()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        HEAD + b"zz\r\n",
        HEAD + b"-5\r\nhello\r\n",
        HEAD + b"3\r\nhello\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_answer_is_broken(data: bytes) -> None:
    with pytest.raises(HttpBroken):
        read(data, [])


def test_events_wherever_they_are_cut() -> None:
    data = b': hint\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{}\n\ndata: [DONE]\n\n'
    for cut in range(len(data)):
        parser = EventParser()
        assert parser.feed(data[:cut]) + parser.feed(data[cut:]) == [b'{"a": 1}', b"{}", b"[DONE]"]
