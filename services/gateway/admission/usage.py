"""Tokens used, by key. Knows names and numbers. The number of names is bounded, since they become labels of
metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MAX_NAMES = 256
# Callers without a key, and names beyond the bound. Neither can be a key's name.
ANONYMOUS = "(none)"
OTHERS = "(others)"


class KeyTokens(NamedTuple):
    """What one key has used."""

    prompt: int = 0
    completion: int = 0


class KeyUsage:
    """Tokens of requests that an engine was given, from the gateway's start on."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._tokens: dict[str, KeyTokens] = {}

    def add(self, name: str | None, num_prompt: int, num_completion: int) -> None:
        """A request of this key is over. Its prompt counts once; its completion with all that was drawn."""
        label = ANONYMOUS if name is None else name
        if label not in self._tokens and len(self._tokens) >= self._max_names:
            label = OTHERS
        old = self._tokens.get(label, KeyTokens())
        self._tokens[label] = KeyTokens(old.prompt + num_prompt, old.completion + num_completion)

    def items(self) -> Iterator[tuple[str, KeyTokens]]:
        """What each key has used."""
        yield from self._tokens.items()
