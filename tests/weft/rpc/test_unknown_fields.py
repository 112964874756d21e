"""What a message holds and this version does not know: named, wherever it is, and quickly."""

from __future__ import annotations

import time

import pytest

from weft.rpc.unknown_fields import MAX_NAMED, unknown_fields
from weft.v1 import engine_service_pb2 as pb

UNKNOWN = b"\xf8\x3f\x01"  # Field 1023, a varint.


def request() -> pb.GenerateTokensRequest:
    message = pb.GenerateTokensRequest(prompt_token_ids=[1, 2, 3])
    message.sampling.logit_bias.add(token_id=1, bias=0.5)
    return message


def test_a_known_message_has_none():
    assert unknown_fields(request()) == []
    assert unknown_fields(pb.GetInfoRequest()) == []


@pytest.mark.parametrize(
    ("within", "path"),
    [
        (lambda message: message, "1023"),
        (lambda message: message.sampling, "sampling.1023"),
        (lambda message: message.sampling.logit_bias[0], "sampling.logit_bias.1023"),
    ],
)
def test_each_is_named_with_its_path(within, path):
    message = request()
    within(message).MergeFromString(UNKNOWN * 5)
    assert unknown_fields(message) == [path]
    assert message.sampling.logit_bias, "the message is left as it was"


def test_of_many_some_are_named():
    message = request()
    for number in range(100, 200):
        key = number << 3
        message.MergeFromString(bytes([key & 0x7F | 0x80, key >> 7, 1]))
    assert len(unknown_fields(message)) == MAX_NAMED


def test_millions_are_refused_at_once():
    message = pb.GenerateTokensRequest.FromString(UNKNOWN * 3_000_000)
    started = time.monotonic()
    assert unknown_fields(message) == ["request"]
    assert time.monotonic() - started < 1
