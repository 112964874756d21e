"""Requests begun and ended. Knows nothing of what a request is."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from weft.rpc.errors import StatusError


class RequestCounters:
    """Requests begun and ended, and how. Equal when nothing is in flight."""

    # Every instance that is alive, for a test that checks the balance of all of them.
    instances: ClassVar[weakref.WeakSet[RequestCounters]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.by_code: Counter[str] = Counter()
        # Calls that took a request up, by how: "attached" to a live one, "revived" one that had ended.
        self.resumes: Counter[str] = Counter()
        RequestCounters.instances.add(self)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count a request that is refused before its life begins."""
        try:
            yield
        except StatusError as error:
            self.begun += 1
            self.ended += 1
            self.by_code[error.code.name] += 1
            raise
