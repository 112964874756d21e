"""Where the search of a block runs: here, or on many workers.

A task is a pure function of tensors, so where it runs never shows in the bytes. This module does not know
what is being searched, nor how distant workers are reached.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch

from services.quantizer.errors import QuantizerError

Task = TypeVar("Task")
Result = TypeVar("Result")

_LOCAL = "local:"


class WorkerPool(Protocol):
    """Runs module-level functions on tasks: dataclasses of tensors and plain values, which they leave as they
    are.

    Attributes:
        num_workers: tasks that can run at one time.
    """

    num_workers: int

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """Results in the order of the tasks. Raises what a task raised, the first of them in that order;
        QuantizerError when there are no workers left.
        """

    def stream(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """As `map`, one after the other: a task is taken only while fewer than `num_workers` are unfinished
        or their results not yet asked for.
        """


class SerialPool:
    """One task after the other, in this process."""

    num_workers = 1

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """See WorkerPool."""
        return [function(task) for task in tasks]

    def stream(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """See WorkerPool."""
        for task in tasks:
            result = function(task)
            del task  # its tensors are not needed while the result is looked at
            yield result


def num_threads(threads: int | None, workers: str | None) -> int:
    """Of this process and of every worker, from what the configuration says of both.

    One number for all, because it decides bits. Private workers share this machine's cores.
    """
    if threads is not None:
        return threads
    if workers is None or not workers.startswith(_LOCAL):
        return torch.get_num_threads()
    return max(1, torch.get_num_threads() // int(workers.removeprefix(_LOCAL)))


def open_pool(workers: str | None, device: torch.device) -> AbstractContextManager[WorkerPool]:
    """The workers of a run, which end with the context. `workers` as in the configuration; None is this
    process. Call it after the threads are set. Raises QuantizerError.
    """
    if workers is None:
        return contextlib.nullcontext(SerialPool())
    if importlib.util.find_spec("ray") is None:
        raise QuantizerError("--workers needs the package ray: pip install 'weft[ray]'")
    from services.quantizer.ray_cluster import open_ray_pool

    return open_ray_pool(workers, device)
