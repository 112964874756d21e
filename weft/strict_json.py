"""JSON read so that no two readers could disagree about it.

The standard parser takes the last of two equal keys, accepts `NaN` and turns `1e999` into infinity. Used for
the files of a model directory and for what clients send. Knows nothing of what the documents mean.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


class StrictJsonError(ValueError):
    """The bytes are not JSON that every reader would understand alike. The text is safe to show."""


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse `data` (UTF-8, no byte order mark) as one JSON object; `what` names it in errors.

    Raises StrictJsonError for anything else, duplicate keys, non-finite numbers and absurd depth included.
    """
    try:
        document = loads(decode(data))
    except StrictJsonError as error:
        raise StrictJsonError(f"{what}: {error}") from None
    if not isinstance(document, dict):
        raise StrictJsonError(f"{what}: a JSON object is expected, found {type(document).__name__}")
    return document


def decode(data: bytes) -> str:
    """`data` as text: UTF-8 without a byte order mark. Raises StrictJsonError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise StrictJsonError("begins with a byte order mark")
    return text


def loads(text: str) -> Any:
    """Parse one document. Raises StrictJsonError, duplicate keys, non-finite numbers and absurd depth
    included.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise StrictJsonError("nested too deeply") from None
    except ValueError as error:
        raise StrictJsonError(str(error)[:200]) from None


def canonical_bytes(document: dict[str, Any]) -> bytes:
    """The one spelling of `document`: sorted keys, no blanks, ASCII, a closing newline. Refuses NaN and
    infinity.
    """
    return (
        json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:64]!r}")
            seen.add(key)
    return document


def _refuse_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is not a JSON number")


def _finite(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise ValueError(f"number {token[:32]} is out of range")
    return number
