"""Who waits for a job to change. A watcher is told that something has changed, not what: it reads the latest
state when it gets to it, so a slow one holds nothing up and nothing queues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class TooManyWatchers(Exception):
    """As many watch as may."""


class WatchersClosed(Exception):
    """The service stops; the watch can be repeated when it is back."""


class Watchers:
    """The watchers of one service, by job."""

    def __init__(self, max_watchers: int) -> None:
        self._max = max_watchers
        self._events: dict[str, set[asyncio.Event]] = {}
        self._count = 0
        self._is_closed = False

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job may have changed; the watcher clears it before it looks.
        Raises TooManyWatchers.
        """
        if self._count >= self._max:
            raise TooManyWatchers
        event = asyncio.Event()
        self._events.setdefault(job_id, set()).add(event)
        self._count += 1
        try:
            yield event
        finally:
            self._count -= 1
            self._events[job_id].discard(event)
            if not self._events[job_id]:
                del self._events[job_id]

    def notify(self, job_id: str) -> None:
        """The job has changed."""
        for event in self._events.get(job_id, ()):
            event.set()

    def notify_all(self) -> None:
        """Any job may have changed."""
        for job_id in self._events:
            self.notify(job_id)

    def close(self) -> None:
        """No more will come: every watcher is woken, and `check` raises from now on."""
        self._is_closed = True
        self.notify_all()

    def check(self) -> None:
        """Raise WatchersClosed once `close` was called."""
        if self._is_closed:
            raise WatchersClosed
