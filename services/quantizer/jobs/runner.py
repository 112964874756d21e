"""What the supervisor asks of whatever runs a job: a subprocess, or a container. Knows neither."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from services.quantizer.jobs.spec import Places

MAX_LINE_CHARS = 8192


class StartFailed(Exception):
    """The run could not be started; the message is one line. It may be worth another try."""


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt at a job. `options` are those of `run`, as the runner's places have it."""

    job_id: str
    token: int
    device: str
    options: dict[str, str | bool]
    needs_network: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: its exit status (128 + n after signal n) and the first line of its standard output."""

    code: int
    first_line: str


class Run(Protocol):
    """A run at work."""

    def lines(self) -> AsyncIterator[str]:
        """The lines of its standard error, clipped, until it has ended."""

    async def wait(self) -> Ended:
        """Its end. To be called after `lines` is exhausted."""

    async def stop(self) -> None:
        """Ask it to end, with force after the grace; returns at once or when it is gone. May come twice."""


class Runner(Protocol):
    """Starts runs."""

    @property
    def places(self) -> Places:
        """Where a run finds sources, artifacts and calibration texts."""

    async def start(self, task: Task) -> Run:
        """Begin. Raises StartFailed."""

    async def remove_leftovers(self, is_live: Callable[[str, int], bool]) -> None:
        """End what services that are gone have left running: whatever `is_live(job_id, token)` denies."""

    async def close(self) -> None:
        """Let go of what the runner itself holds."""
