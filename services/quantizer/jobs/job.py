"""What a job is: its states, its record, the lease under which one runs. Knows no database and no wire."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where a job stands; the names are those of the wire."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PUBLISHING = "PUBLISHING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def has_ended(self) -> bool:
        """Whether the job stays as it is from now on."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the database. Times are milliseconds of the wall clock, for people; `sequence` orders jobs.

    `spec` is JSON text. `eta_s` is None until there is a pace.
    """

    job_id: str
    sequence: int
    caller: str
    request_id: str
    name: str
    spec: str
    state: State
    message: str
    done: int
    total: int
    eta_s: float | None
    attempt: int
    crashes: int
    device: str
    is_cancelled: bool
    artifact_version: str
    created_ms: int
    started_ms: int | None
    ended_ms: int | None


@dataclass(frozen=True, slots=True)
class NewJob:
    """What CreateJob brings. `device` "" means any, "cuda" any GPU."""

    job_id: str
    caller: str
    request_id: str
    body_digest: str
    name: str
    spec: str
    device: str


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a job: whoever took it later has the larger token."""

    job_id: str
    owner: str
    token: int


class LeaseLost(Exception):
    """Someone else holds the job by now; nothing of it may be changed."""


class QueueFull(Exception):
    """As many jobs wait as may."""


class RequestReused(Exception):
    """The request id came with another body before."""


class DatabaseRefused(Exception):
    """The database cannot be used; the message is one line for a person."""
