"""Stop strings against a naive reading of the whole text, cut into pieces in every way hypothesis can think
of.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.text.stops import StopMatcher

letters = st.text(alphabet="abc", min_size=1, max_size=5)


def naive(pieces: list[tuple[str, bool]], stops: list[str]) -> tuple[str, str | None]:
    """Grow the text character by character; the first armed character at which any stop ends decides."""
    text = ""
    for piece, is_armed in pieces:
        for character in piece:
            text += character
            matches = [stop for stop in stops if text.endswith(stop)]
            if matches and is_armed:
                stop = max(matches, key=len)
                return text[: -len(stop)], stop
    return text, None


def streamed(pieces: list[tuple[str, bool]], stops: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    out: list[str] = []
    for piece, is_armed in pieces:
        text, stop = matcher.push(piece, is_armed=is_armed)
        out.append(text)
        if stop is not None:
            return out, stop
    return [*out, matcher.finish()], None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.text(alphabet="abc", max_size=4), st.booleans()), max_size=12),
    st.lists(letters, min_size=1, max_size=5),
)
def test_same_text_and_same_stop_as_the_naive_reading(
    pieces: list[tuple[str, bool]], stops: list[str]
) -> None:
    # Armed once is armed for good, as with min_tokens.
    num_early = sum(1 for _, is_armed in pieces if not is_armed)
    pieces = [(piece, index >= num_early) for index, (piece, _) in enumerate(pieces)]
    out, stop = streamed(pieces, stops)
    assert ("".join(out), stop) == naive(pieces, stops)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(alphabet="abc", max_size=4), max_size=10),
    st.lists(letters, min_size=1, max_size=5),
    st.booleans(),
)
def test_holds_back_no_more_than_could_become_a_match(
    pieces: list[str], stops: list[str], is_armed: bool
) -> None:
    matcher = StopMatcher(stops)
    whole, sent = "", ""
    for piece in pieces:
        text, stop = matcher.push(piece, is_armed=is_armed)
        whole += piece
        sent += text
        if stop is not None:
            return
        held = whole[len(sent) :]
        longest = max((n for s in stops for n in range(len(s)) if whole.endswith(s[:n])), default=0)
        assert len(held) == longest


def test_ties_go_to_the_longest_and_ends_to_the_first() -> None:
    assert streamed([("xabc", True)], ["bc", "abc"]) == (["x"], "abc")
    assert streamed([("xabcd", True)], ["abcd", "bc"]) == (["xa"], "bc")


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])


def test_cost_is_linear_in_hostile_text() -> None:
    stops = ["a" * 255 + "b"] + [f"{i:03d}" + "a" * 250 for i in range(15)]
    matcher = StopMatcher(stops)
    begin = time.perf_counter()
    num_chars = 0
    for _ in range(2000):
        num_chars += len(matcher.push("aaaa").text)
    assert time.perf_counter() - begin < 1.0
    assert num_chars == 8000 - 255
