"""Which engine has seen how much of a prompt: a bounded map from hashes of its beginnings. Pure.

A hash stands for one beginning of one length, salted with all that keeps caches apart. It decides where a
request goes, never what is computed: a hash that is wrong costs time and nothing else. Python's own hash of
bytes is keyed per process, so nobody can aim at another's entries.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

MAX_ENTRIES = 1 << 16
# Lengths of the beginnings that are remembered, in tokens: each at most half as long again as the one before.
LENGTHS = tuple(base << power for power in range(10) for base in (32, 48))


class Owner(NamedTuple):
    """An engine in one of its lives: what it had cached before it was lost is gone."""

    target: str
    session: int


class Prefix(NamedTuple):
    """The beginnings of one prompt: a hash for each, with its length in tokens, longest first."""

    hashes: tuple[tuple[int, int], ...]


def prefix_of(token_ids: Sequence[int], salt: Hashable) -> Prefix:
    """What `PrefixMap` needs of a prompt. `salt` holds all that keeps one cache from another."""
    data = array("Q", token_ids[: LENGTHS[-1]]).tobytes()
    return Prefix(
        tuple(
            (length, hash((salt, data[: 8 * length])))
            for length in reversed(LENGTHS)
            if length <= len(token_ids)
        )
    )


class PrefixMap:
    """At most `max_entries` beginnings, the least recently used forgotten first."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._owners: OrderedDict[int, Owner] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def find(self, prefix: Prefix) -> tuple[Owner, int] | None:
        """Who has seen the longest beginning, and its length in tokens."""
        for length, key in prefix.hashes:
            owner = self._owners.get(key)
            if owner is not None:
                self._owners.move_to_end(key)
                return owner, length
        return None

    def add(self, prefix: Prefix, owner: Owner) -> None:
        """`owner` computes this prompt now."""
        owners = self._owners
        for _, key in prefix.hashes:
            owners[key] = owner
            owners.move_to_end(key)
        while len(owners) > self._max_entries:
            owners.popitem(last=False)
