"""Where the search of a block runs: here, or on many workers.

A task is a pure function of tensors, so where it runs never shows in the bytes. This module does not know
what is being searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerPool(Protocol):
    """Runs module-level functions on picklable tasks."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """Results in the order of the tasks. Raises what a task raised."""


class SerialPool:
    """One task after the other, in this process."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """See WorkerPool."""
        return [function(task) for task in tasks]
