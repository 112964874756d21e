"""What is refused before the loop is asked: it answers between two steps, and a step may take long.

Counts on the event loop what has been handed over and not been answered, and reads the loop's newest
snapshot for the rest. It may refuse a request that would just have found room; it never admits one: the
core decides.
"""

from __future__ import annotations

from services.engine.core.errors import Draining, QueueFull, RequestError
from services.engine.loop import EngineLoop

RETRY_AFTER_S = 1.0


class Door:
    """One per engine; every link and call goes through it."""

    def __init__(self, loop: EngineLoop, *, max_queue_size: int, max_batch_size: int) -> None:
        self._loop = loop
        self._max_queue_size = max_queue_size
        self._max_batch_size = max_batch_size
        self.num_unanswered = 0

    def refusal(self) -> RequestError | None:
        """Why nothing more is let in right now, or None."""
        if self._loop.is_draining:
            return Draining("the engine is draining")
        report = self._loop.load()
        # What is handed over may run in the step to come, so it counts against batch and queue together.
        num_all = report.num_running + report.num_waiting + self.num_unanswered
        is_full = num_all >= self._max_queue_size + self._max_batch_size
        if is_full or report.num_waiting >= self._max_queue_size:
            return QueueFull(f"{num_all} sequences are running or waiting", RETRY_AFTER_S)
        return None
