"""Strict JSON: equal to the standard parser's on what is good, an error on what readers might take apart."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.text.strict_json import StrictJsonError, parse

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(values, st.booleans())
def test_good_json_is_what_it_always_was(value: object, is_ascii: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[NaN]",
        b"[Infinity]",
        b"[-Infinity]",
        b"[1e999]",
        b'{"a": 1, "a": 1}',
        b'[{"b": {"a": 1, "a": 2}}]',
        b'["\xff"]',
        b'["\\ud800"]',
        b'["\\udc00\\ud800"]',
        b"\xef\xbb\xbf[]",
        b"[" * 33 + b"]" * 33,
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b"[" + b"9" * 5000 + b"]",
        b"[" + b"1," * 300_000 + b"1]",
        b"[1] x",
        b'"' + b'\\"' * 100_000,
        b'"' + b'\\"' * 100_000 + b"\\",
        b"[" + b"," * 200_001 + b'"' + b'\\"' * 100_000,
    ],
)
def test_bad_json_is_refused_quickly(data: bytes) -> None:
    begin = time.perf_counter()
    with pytest.raises(StrictJsonError):
        parse(data)
    assert time.perf_counter() - begin < 2.0


def test_brackets_and_commas_inside_strings_are_text() -> None:
    text = "[{" * 1000 + ',,"\\' * 100_000
    assert parse(json.dumps([text]).encode()) == [text]
