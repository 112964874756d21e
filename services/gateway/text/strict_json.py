"""Strict JSON from strangers: what `weft.strict_json` refuses, and bounds on depth and members before it
parses.

Knows nothing of what the documents mean.
"""

from __future__ import annotations

import re
from typing import Any

from weft.strict_json import StrictJsonError, decode, loads

__all__ = ["MAX_DEPTH", "StrictJsonError", "parse"]

MAX_DEPTH = 32
# A string, one that never ends included: if it did not match, the next try would begin at its next quote, and
# the cost would be the square of the length. Possessive, so nothing is tried twice.
_STRING = r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'
_BRACKETS = re.compile(rf"{_STRING}|[\[\]{{}}]", re.DOTALL)
_COMMAS = re.compile(rf"{_STRING}|,", re.DOTALL)


def parse(data: bytes, *, max_depth: int = MAX_DEPTH, max_members: int = 200_000) -> Any:
    """Parse UTF-8 `data`. Refuses duplicate keys, NaN and infinities, lone surrogates, a byte order mark,
    nesting below `max_depth` and more than `max_members` commas (each costs an object). Linear in `data`.
    """
    text = decode(data)
    if text.count(",") > max_members:
        _check_members(text, max_members)
    _check_depth(text, max_depth)
    document = loads(text)
    if "\\u" in text:
        _check_surrogates(document)
    return document


def _check_members(text: str, max_members: int) -> None:
    """Commas inside strings are prose; only the others make objects."""
    num_members = 0
    for match in _COMMAS.finditer(text):
        if match.group() == ",":
            num_members += 1
            if num_members > max_members:
                raise StrictJsonError(f"more than {max_members} members")


def _check_depth(text: str, max_depth: int) -> None:
    depth = 0
    for match in _BRACKETS.finditer(text):
        bracket = match.group()
        if bracket in "[{":
            depth += 1
            if depth > max_depth:
                raise StrictJsonError(f"nested deeper than {max_depth}")
        elif bracket in "]}":
            depth -= 1


def _check_surrogates(document: Any) -> None:
    """A lone surrogate is a Python string that no UTF-8 can hold."""
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise StrictJsonError("a string holds a lone surrogate") from None
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value)
            pending.extend(value.values())
