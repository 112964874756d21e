"""Exceptions as text for a log: where they came from, and what they say unless it may be a client's text."""

from __future__ import annotations

import traceback

MAX_STACK_CHARS = 32 << 10
_WITHHELD = "(withheld: it may hold what a client wrote)"
# What these say is about code and files. A ValueError or KeyError quotes the value, a library's own anything.
_TELLING = (AttributeError, ImportError, IndexError, MemoryError, NameError, OSError, RuntimeError, TypeError)
_OURS = ("weft.", "grpc.")


def stack_text(error: BaseException, *, is_private: bool) -> str:
    """The stack of an exception and of those that led to it, the first one first; at most `MAX_STACK_CHARS`,
    of which the last are kept. `is_private` withholds messages that may quote data.
    """
    parts: list[str] = []
    for number, each in enumerate(_chain(error)):
        if number:
            parts.append("\nwhich led to:\n\n")
        parts.append("Traceback (most recent call last):\n")
        parts += traceback.format_tb(each.__traceback__)
        parts.append(f"{type(each).__qualname__}: {_message(each, is_private)}\n")
    text = "".join(parts)
    return text if len(text) <= MAX_STACK_CHARS else "..." + text[-MAX_STACK_CHARS:]


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in found and len(found) < 10:
        found.append(each)
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return found[::-1]


def _message(error: BaseException, is_private: bool) -> str:
    kind = type(error)
    if is_private and not (issubclass(kind, _TELLING) or kind.__module__.startswith(_OURS)):
        return _WITHHELD
    try:
        return str(error)
    except Exception as unwritable:  # an exception whose text cannot be made must not cost the stack
        return f"({type(unwritable).__name__} while its text was made)"
