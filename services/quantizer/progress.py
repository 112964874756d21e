"""How far the job is: a bar on a terminal, log lines elsewhere. Knows nothing of what is being done."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from weft import logs

_LOGGER = logs.get_logger("quantizer")


class ProgressReporter:
    """`total` steps; use it as a context manager and `advance` after each."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
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

    def advance(self, what: str) -> None:
        """One step is done; `what` says which."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=what)
        else:
            _LOGGER.info("progress", done=self._done, total=self._total, what=what)
