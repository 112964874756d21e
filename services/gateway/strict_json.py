"""JSON from a client or a model directory, read so that no two readers could disagree about it.

The standard parser takes the last of two equal keys, accepts `NaN`, turns `1e999` into infinity and
recurses as deep as the text says. Knows nothing of what the documents mean.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 32
# A string, one that never ends included: if it did not match, the next try would begin at its next quote, and
# the cost would be the square of the length. Possessive, so nothing is tried twice.
_STRING = r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'
_BRACKETS = re.compile(rf"{_STRING}|[\[\]{{}}]", re.DOTALL)
_COMMAS = re.compile(rf"{_STRING}|,", re.DOTALL)


class StrictJsonError(ValueError):
    """The bytes are not JSON that every reader would understand alike. The text is safe to show."""


def parse(data: bytes, *, max_depth: int = MAX_DEPTH, max_members: int = 200_000) -> Any:
    """Parse UTF-8 `data`. Refuses duplicate keys, NaN and infinities, lone surrogates, a byte order mark,
    nesting below `max_depth` and more than `max_members` commas (each costs an object). Linear in `data`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise StrictJsonError("begins with a byte order mark")
    if text.count(",") > max_members:
        _check_members(text, max_members)
    _check_depth(text, max_depth)
    try:
        document = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise StrictJsonError("nested too deeply") from None
    except ValueError as error:
        raise StrictJsonError(str(error)[:200]) from None
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


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJsonError(f"duplicate key {key[:64]!r}")
            seen.add(key)
    return document


def _refuse_constant(token: str) -> NoReturn:
    raise StrictJsonError(f"{token} is not a JSON number")


def _finite(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise StrictJsonError(f"number {token[:32]} is out of range")
    return number
