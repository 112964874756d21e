"""Which windows are taken: no duplicates, shares by weight, one seed one choice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.quantizer.selection import Unique, select, shares


def rows(*firsts):
    return np.array([[first, 0, 1] for first in firsts], np.int32)


def test_duplicates_are_dropped_over_all_files_and_counted():
    seen = Unique()
    kept, dropped = seen.windows(rows(1, 2, 1))
    assert kept.tolist() == rows(1, 2).tolist()
    assert dropped == 1
    kept, dropped = seen.windows(rows(2, 3))
    assert (kept.tolist(), dropped) == (rows(3).tolist(), 1)
    assert Unique().windows(np.zeros((0, 3), np.int32))[1] == 0


def test_long_paragraphs_and_documents_are_dropped_when_they_come_again():
    long = "a paragraph that is long enough not to be a heading, nor what people say in every book " * 2
    seen = Unique()
    text, dropped = seen.paragraphs(f"{long}\n\nYes.\n\n{long.replace(' ', chr(10))}\n\nYes.\n\nThe end.")
    assert text == f"{long.strip()}\n\nYes.\n\nYes.\n\nThe end."
    assert dropped == 1
    assert seen.paragraphs(long) == ("", 1)
    seen = Unique()
    assert seen.documents(["a", "b", "a"]) == (["a", "b"], 1)
    assert seen.documents(["b"]) == ([], 1)


@pytest.mark.parametrize(
    ("weights", "counts", "wanted", "given"),
    [
        ([3, 1], [100, 100], 8, [6, 2]),
        ([1, 1, 1], [9, 9, 9], 4, [2, 1, 1]),
        ([9, 1], [2, 100], 10, [2, 8]),  # what the first lacks the second gives
        ([1, 1], [2, 3], 10, [2, 3]),
        ([1, 1000], [5, 5], 1, [0, 1]),
    ],
)
def test_shares(weights, counts, wanted, given):
    assert shares(weights, counts, wanted) == given


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_shares_take_all_that_is_wanted_and_no_more_than_there_is(parts, wanted):
    weights, counts = [w for w, _ in parts], [c for _, c in parts]
    found = shares(weights, counts, wanted)
    assert sum(found) == min(wanted, sum(counts))
    assert all(0 <= n <= count for n, count in zip(found, counts, strict=True))


def test_without_weights_all_windows_are_alike():
    parts = [rows(*range(30)), rows(*range(100, 200))]
    first, again, other = (select(parts, [None, None], 13, seed) for seed in (5, 5, 6))
    assert first == again != other
    assert sum(map(len, first)) == 13
    assert len(first[1]) > len(first[0])
    assert all(indices == sorted(set(indices)) for indices in first)
    assert select(parts, [None, None], 500, 0) == [list(range(30)), list(range(100))]


def test_with_a_weight_parts_give_their_shares():
    parts = [rows(*range(30)), rows(*range(100, 200))]
    first, again, other = (select(parts, [3.0, None], 12, seed) for seed in (5, 5, 6))
    assert first == again != other
    assert [len(indices) for indices in first] == [9, 3]
