"""The tasks of one `stream` in flight: handed out in their order, again when one is lost with its worker,
their answers taken in the same order.

This module does not know workers, nor what an answer is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, order=True)
class Job:
    """A task as it is handed out: its place among the others, what a worker is called with, and how often it
    was lost.
    """

    index: int
    arguments: list[Any] = field(compare=False)
    num_losses: int = field(default=0, compare=False)


class TaskQueue:
    """Takes a task only while fewer than `limit` (inf: any number) are unfinished or their answers not yet
    taken. `arguments` makes of a task what a worker is called with.
    """

    def __init__(self, tasks: Iterator[Any], arguments: Callable[[Any], list[Any]], limit: float) -> None:
        self._tasks, self._arguments, self._limit = tasks, arguments, limit
        self._again: list[Job] = []
        self._answers: dict[int, Any] = {}
        self._num_taken, self._num_given = 0, 0
        self._is_exhausted = False

    def next_job(self) -> Job | None:
        """What to hand out next: what was lost goes first. None if there is nothing for now."""
        if self._again:
            return heapq.heappop(self._again)
        if self._is_exhausted or self._num_taken - self._num_given >= self._limit:
            return None
        try:
            task = next(self._tasks)
        except StopIteration:
            self._is_exhausted = True
            return None
        job = Job(self._num_taken, self._arguments(task))
        self._num_taken += 1
        return job

    def answer(self, job: Job, answer: Any) -> None:
        """A job is done."""
        self._answers[job.index] = answer

    def lose(self, job: Job) -> None:
        """A job went with its worker, and is to be handed out again."""
        job.num_losses += 1
        heapq.heappush(self._again, job)

    @property
    def has_answer(self) -> bool:
        """Whether the answer that is due is there."""
        return self._num_given in self._answers

    @property
    def is_done(self) -> bool:
        """Whether all answers have been taken and there are no more tasks."""
        return self._is_exhausted and self._num_given == self._num_taken

    def take_answer(self) -> Any:
        """The answer that is due; from then on it is the next one's turn."""
        answer = self._answers.pop(self._num_given)
        self._num_given += 1
        return answer
