"""Tokens in columns are the events that went in, however they are put together and taken apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.engine.core.events import TokenEvent, Tokens

alternatives = st.lists(st.tuples(st.integers(0, 99), st.floats(-9, 0)), max_size=2).map(tuple)
events = st.builds(
    lambda key, token_id, position, logprob, top, ttft_s, itl_s: TokenEvent(
        key, token_id, position, logprob, () if logprob is None else top, ttft_s, itl_s
    ),
    st.integers(0, 3),
    st.integers(0, 99),
    st.integers(0, 9),
    st.none() | st.floats(-9, 0),
    alternatives,
    st.none() | st.floats(0, 9),
    st.none() | st.floats(0, 9),
)


@given(st.lists(events), st.lists(events), st.data())
def test_columns_are_the_rows_that_went_in(first, second, data):
    tokens = Tokens.of(first)
    assert list(tokens) == first
    assert len(tokens) == len(first)
    other = Tokens.of(second)
    tokens.extend(other, [event.key for event in second])
    assert list(tokens) == first + second
    assert list(other) == second, "the other's columns are its own"
    both = first + second
    is_wanted = data.draw(st.lists(st.booleans(), min_size=len(both), max_size=len(both)))
    wanted = [event for event, wanted in zip(both, is_wanted, strict=True) if wanted]
    assert list(tokens.where(is_wanted)) == wanted
