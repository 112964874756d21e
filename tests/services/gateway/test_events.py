"""The messages of updates, and the short way to the most usual one."""

from __future__ import annotations

import random

import pytest

from benchmarks.gateway_hot_path import resolved_request
from services.gateway.events import plain_delta, responses
from services.gateway.request import SampleEnd, SampleUpdate
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb

SIZES = (0, 1, 127, 128, 255, 16_383, 16_384, 16_385, 2**21 - 1, 2**21, 2**31, 2**32 - 1)
TEXTS = ("", "a", " word", "\x00", "\u00e9", "\ufffd", "\U0001f600" * 40, "x" * 127, "x" * 128, "x" * 20_000)


def test_the_short_way_gives_the_messages_bytes() -> None:
    rng = random.Random(1)
    resolved = resolved_request(None, 0, ())
    for _ in range(3000):
        token_ids = [
            rng.choice((rng.choice(SIZES), rng.randrange(200_000)))
            for _ in range(rng.choice((1, 1, 2, 9, 300)))
        ]
        offset = rng.choice((rng.choice(SIZES), rng.randrange(1 << 40), 2**64 - 1))
        update = SampleUpdate(rng.choice((0, 0, 1, 7, 130)), rng.choice(TEXTS), token_ids, [], offset, None)
        (message,) = responses(resolved, update)
        assert plain_delta(update) == message.SerializeToString()


@pytest.mark.parametrize(
    "change",
    [
        {"end": SampleEnd(pb.FINISH_REASON_LENGTH, "", pb.Usage(), pb.Receipt())},
        {"logprobs": [engine_pb.EntryLogprobs(logprob=-1)]},
        {"token_ids": []},
    ],
)
def test_what_has_more_to_tell_goes_the_long_way(change: dict[str, object]) -> None:
    assert plain_delta(SampleUpdate(0, "text", [5], [], 4, None)._replace(**change)) is None
