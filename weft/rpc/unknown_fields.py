"""Fields that a message carries and this version does not know. Knows no message.

A service refuses them: what it would ignore may be what the caller cares about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

MAX_NAMED = 20
MAX_SEARCHED_BYTES = 16 << 10


def unknown_fields(message: Message) -> list[str]:
    """The paths of unknown fields, nested ones included, each ending in the field's number; at most
    `MAX_NAMED`. Millions of them fit into a message: one longer than `MAX_SEARCHED_BYTES` gives "request".
    """
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    size = message.ByteSize()
    if known.ByteSize() == size:
        return []
    if size > MAX_SEARCHED_BYTES:
        return ["request"]
    return list(islice(dict.fromkeys(_paths(message, "")), MAX_NAMED))


def _paths(message: Message, path: str) -> Iterator[str]:
    found: Iterable[Any] = cast(Any, UnknownFieldSet)(message)
    for field in found:
        yield f"{path}{field.field_number}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for item in value if descriptor.is_repeated else (value,):
            yield from _paths(item, f"{path}{descriptor.name}.")
