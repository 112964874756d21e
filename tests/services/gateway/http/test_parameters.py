"""What is refused before it is made into anything: the cost of a body ends with its limits."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway.http.errors import HttpError
from services.gateway.http.parameters import parse_request
from weft.limits import RequestLimits

LIMITS = RequestLimits(
    max_logit_bias=3, max_stop_token_ids=3, max_stop_strings=3, max_messages=3, max_prompts=3
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {"no id": "no number", "b": 1, "c": 1, "d": 1}),
        ("stop_token_ids", ["no id"] * 4),
        ("stop", ["x"] * 4),
        ("messages", ["no message"] * 4),
        ("prompt", [5.5] * 4),
    ],
)
def test_the_length_of_a_list_is_judged_before_its_entries(name: str, value: Any) -> None:
    """What would be said of an entry shows that entries were looked at: there may be 200,000."""
    is_chat = name == "messages"
    body: dict[str, Any] = {} if is_chat else {"prompt": "x"}
    with pytest.raises(HttpError, match="must have at most 3") as caught:
        parse_request({**body, name: value}, is_chat=is_chat, limits=LIMITS)
    assert (caught.value.status, caught.value.param) == (400, name)


def test_a_request_is_made_when_its_prompt_has_its_turn() -> None:
    """64 prompts beside 8 MiB of other fields are not 64 times 8 MiB when the first one is refused."""
    found = parse_request({"prompt": ["a", "b", [7]], "seed": 5}, is_chat=False, limits=LIMITS)
    assert found.num_prompts == 3
    assert not found.common.WhichOneof("prompt")
    first, second, third = (found.generate(index) for index in range(3))
    assert (first.text, second.text, list(third.token_ids.ids)) == ("a", "b", [7])
    assert {request.sampling.seed for request in (first, second, third)} == {5}


def test_a_chat_is_one_request() -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    found = parse_request(body, is_chat=True, limits=LIMITS)
    assert found.num_prompts == 1
    assert found.generate(0).chat.messages[0].content == "x"


def test_many_unknown_names_are_told_in_order() -> None:
    body = {"prompt": "x", **{f"u{number:03}": 1 for number in range(100)}}
    with pytest.raises(HttpError) as caught:
        parse_request(body, is_chat=False)
    assert caught.value.param == "u000"
    assert caught.value.message.endswith("u018, u019")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, (False, False)),
        ({}, (False, False)),
        ({"include_usage": True}, (True, False)),
        ({"include_usage": True, "continuous_usage_stats": True}, (True, True)),
        ({"continuous_usage_stats": True}, (True, True)),
        ({"include_usage": False, "continuous_usage_stats": False}, (False, False)),
    ],
)
def test_usage_comes_at_the_end_and_with_each_chunk(options: Any, expected: tuple[bool, bool]) -> None:
    body = {"prompt": "x", "stream": True, "stream_options": options}
    found = parse_request(body, is_chat=False, limits=LIMITS)
    assert (found.includes_usage, found.counts_chunks) == expected


@pytest.mark.parametrize(
    "options",
    [{"continuous_usage_stats": 1}, {"include_usage": False, "continuous_usage_stats": True}],
)
def test_usage_of_chunks_without_usage_is_refused(options: Any) -> None:
    body = {"prompt": "x", "stream": True, "stream_options": options}
    with pytest.raises(HttpError) as caught:
        parse_request(body, is_chat=False, limits=LIMITS)
    assert (caught.value.status, caught.value.param) == (400, "stream_options.continuous_usage_stats")
