"""How far the job is: a bar on a terminal, log lines elsewhere. Knows nothing of what is being done.

Without a terminal: `plan` once, `progress` after each step, `publishing`, `published`. Whoever runs the job
as a child reads these lines.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from weft import logs

_LOGGER = logs.get_logger("quantizer")


class ProgressReporter:
    """`total` steps; use it as a context manager and `advance` after each."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._since = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> ProgressReporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(
        self, text: str, *, blocks: int, resumed_blocks: int, memory: int, available: int | None
    ) -> None:
        """What is going to be done and what it takes, in bytes; `text` is the same for people. The steps of
        resumed blocks are done.
        """
        self._done = resumed_blocks
        self._since = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
            self._bar.update(self._task, completed=resumed_blocks)
        else:
            _LOGGER.info(
                "plan",
                blocks=blocks,
                memory_bytes=memory,
                memory_available_bytes=available,
                resumed_blocks=resumed_blocks,
            )

    def advance(self, what: str) -> None:
        """One step is done; `what` says which."""
        self._done += 1
        now = time.monotonic()
        seconds, self._since = round(now - self._since, 3), now
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=what)
        else:
            _LOGGER.info("progress", done=self._done, total=self._total, what=what, seconds=seconds)

    def publishing(self) -> None:
        """All steps are done; what was made is about to appear."""
        if self._bar is not None:
            self._bar.update(self._task, description="publishing")
        else:
            _LOGGER.info("publishing")

    def published(self, version: str) -> None:
        """It has appeared."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"published {version}")
        else:
            _LOGGER.info("published", version=version)
