"""Fields that a message carries and this version does not know. Knows no message.

A service refuses them: what it would ignore may be what the caller cares about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet


def unknown_fields(message: Message, path: str = "") -> Iterator[str]:
    """The paths of unknown fields, nested ones included, each ending in the field's number."""
    found: Iterable[Any] = cast(Any, UnknownFieldSet)(message)
    for field in found:
        yield f"{path}{field.field_number}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for item in value if descriptor.is_repeated else (value,):
            yield from unknown_fields(item, f"{path}{descriptor.name}.")
