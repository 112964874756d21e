"""The jobs in SQLite: what is asked of the tables in schema.py. No other file holds SQL. Used from one
thread; `JobStore` is what others call.

Each method is one transaction, durable when it returns (WAL with synchronous FULL, which is why the file must
lie on a disk of its own machine). What a runner writes is guarded by its lease: owner and fencing token must
still be those of the row. The lease of a service is its row in `owners`, renewed by `heartbeat`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.quantizer.jobs.clock import Clock
from services.quantizer.jobs.job import (
    Job,
    Lease,
    LeaseLost,
    NewJob,
    QueueFull,
    RequestReused,
    State,
)
from services.quantizer.jobs.schema import open_database

_COLUMNS = (
    "job_id, sequence, caller, request_id, name, spec, state, message, done, total, eta_s, attempt, crashes,"
    " device, is_cancelled, artifact_version, created_ms, started_ms, ended_ms"
)
_LIVE = "state IN ('RUNNING', 'PUBLISHING')"
_ENDED = "state IN ('SUCCEEDED', 'FAILED', 'CANCELLED')"


class Database:
    """One connection. Raises DatabaseRefused when the file is damaged, foreign or from a newer version."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._clock = clock
        self._connection = open_database(path)

    def close(self) -> None:
        """Let the file go."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection.execute
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    # Clients.

    def create(self, new: NewJob, max_queued: int, max_kept: int) -> tuple[Job, bool]:
        """The new job and True, or the one that the same request made before and False. Raises RequestReused
        or QueueFull. Of the jobs that have ended the newest `max_kept` stay.
        """
        with self._transaction() as execute:
            row = execute(
                "SELECT job_id, body_digest FROM jobs WHERE caller = ? AND request_id = ?",
                (new.caller, new.request_id),
            ).fetchone()
            if row is not None:
                if row[1] != new.body_digest:
                    raise RequestReused
                return self._job(row[0]), False
            (queued,) = execute("SELECT count(*) FROM jobs WHERE state = 'QUEUED'").fetchone()
            if queued >= max_queued:
                raise QueueFull
            execute(
                "INSERT INTO jobs (job_id, caller, request_id, body_digest, name, spec, wanted_device, state,"
                " created_ms) VALUES (?, ?, ?, ?, ?, ?, ?, 'QUEUED', ?)",
                (
                    *(
                        new.job_id,
                        new.caller,
                        new.request_id,
                        new.body_digest,
                        new.name,
                        new.spec,
                        new.device,
                    ),
                    self._clock.wall_ms(),
                ),
            )
            execute(
                f"DELETE FROM jobs WHERE {_ENDED} AND sequence NOT IN"
                f" (SELECT sequence FROM jobs WHERE {_ENDED} ORDER BY sequence DESC LIMIT ?)",
                (max_kept,),
            )
            return self._job(new.job_id), True

    def get(self, job_id: str) -> Job | None:
        """The job, or None."""
        row = self._connection.execute(f"SELECT {_COLUMNS} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return None if row is None else _job_of(row)

    def log_lines(self, job_id: str) -> list[str]:
        """The last lines of the job, as `save_log` left them."""
        rows = self._connection.execute(
            "SELECT line FROM log_lines JOIN jobs USING (sequence) WHERE job_id = ? ORDER BY number",
            (job_id,),
        )
        return [line for (line,) in rows]

    def page(self, before: int | None, limit: int) -> list[Job]:
        """At most `limit` jobs older than the sequence number `before`, newest first."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE sequence < ? ORDER BY sequence DESC LIMIT ?",
            ((1 << 63) - 1 if before is None else before, limit),
        )
        return [_job_of(row) for row in rows]

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that waits, mark one that runs; None when there is no such job."""
        with self._transaction() as execute:
            execute(
                "UPDATE jobs SET is_cancelled = 1, state = 'CANCELLED', ended_ms = ?, eta_s = NULL,"
                " message = 'cancelled before it ran' WHERE job_id = ? AND state = 'QUEUED'",
                (self._clock.wall_ms(), job_id),
            )
            execute(f"UPDATE jobs SET is_cancelled = 1 WHERE job_id = ? AND {_LIVE}", (job_id,))
            return self.get(job_id)

    # Services.

    def state_id(self) -> str:
        """What tells this database from others: made with it, the same ever after."""
        with self._transaction() as execute:
            execute(
                "INSERT OR IGNORE INTO counters VALUES ('state_id', ?)",
                (int.from_bytes(os.urandom(7), "big"),),
            )
            (number,) = execute("SELECT value FROM counters WHERE name = 'state_id'").fetchone()
            return f"{number:014x}"

    def heartbeat(self, owner: str, lease_s: float) -> None:
        """Renew the lease of a service on all its jobs, or begin one."""
        with self._transaction() as execute:
            execute(
                "INSERT INTO owners VALUES (?1, ?2, ?3)"
                " ON CONFLICT (owner) DO UPDATE SET boot = ?2, expires = ?3",
                (owner, self._clock.boot, self._clock.now() + lease_s),
            )

    def owners(self) -> list[str]:
        """Services that hold a lease, or died with one."""
        return [owner for (owner,) in self._connection.execute("SELECT owner FROM owners")]

    def held(self, owner: str) -> dict[str, tuple[int, bool]]:
        """Job id -> (fencing token, whether it was cancelled) of the jobs that a service holds."""
        rows = self._connection.execute(
            "SELECT job_id, fencing_token, is_cancelled FROM jobs WHERE lease_owner = ?", (owner,)
        )
        return {job_id: (token, bool(is_cancelled)) for job_id, token, is_cancelled in rows}

    def live_tokens(self) -> dict[str, int]:
        """Job id -> fencing token of the jobs that any service holds."""
        return dict(self._connection.execute(f"SELECT job_id, fencing_token FROM jobs WHERE {_LIVE}"))

    def last_token(self) -> int:
        """The largest fencing token that was given out."""
        (token,) = self._connection.execute(
            "SELECT value FROM counters WHERE name = 'fencing_token'"
        ).fetchone()
        return int(token)

    def release(self, owner: str) -> None:
        """A service that holds no job any more says goodbye."""
        with self._transaction() as execute:
            execute(
                "DELETE FROM owners WHERE owner = ?1"
                " AND NOT EXISTS (SELECT 1 FROM jobs WHERE lease_owner = ?1)",
                (owner,),
            )

    def take_over(self, owner: str, dead: Iterable[str]) -> list[str]:
        """Put the jobs of dead services back into the queue: of those named, of those whose lease has run
        out, and of those from before the machine was started. Returns the job ids.
        """
        with self._transaction() as execute:
            rows = execute(
                "SELECT owner FROM owners WHERE owner <> ? AND (boot <> ? OR expires < ?)",
                (owner, self._clock.boot, self._clock.now()),
            ).fetchall()
            taken: list[str] = []
            for other in {*(name for (name,) in rows), *dead} - {owner}:
                found = execute("SELECT job_id FROM jobs WHERE lease_owner = ?", (other,)).fetchall()
                taken += [job_id for (job_id,) in found]
                execute(
                    "UPDATE jobs SET state = 'CANCELLED', ended_ms = ?, message = 'cancelled', eta_s = NULL,"
                    " lease_owner = NULL WHERE lease_owner = ? AND is_cancelled",
                    (self._clock.wall_ms(), other),
                )
                execute(
                    "UPDATE jobs SET state = 'QUEUED', lease_owner = NULL, eta_s = NULL, message ="
                    " 'its service stopped; it goes on from the last finished block' WHERE lease_owner = ?",
                    (other,),
                )
                execute("DELETE FROM owners WHERE owner = ?", (other,))
            return taken

    def claim(self, owner: str, device: str, floor: Callable[[str], int]) -> tuple[Job, Lease] | None:
        """The oldest job that may run on `device` now: its time has come and no other of its name runs. Its
        fencing token is larger than every one before and than `floor(name)`.
        """
        with self._transaction() as execute:
            row = execute(
                "SELECT job_id, name FROM jobs AS waiting WHERE state = 'QUEUED'"
                " AND (not_before_boot <> ?1 OR not_before <= ?2)"
                " AND wanted_device IN ('', ?3, ?4)"
                f" AND NOT EXISTS (SELECT 1 FROM jobs WHERE {_LIVE} AND jobs.name = waiting.name)"
                " ORDER BY sequence LIMIT 1",
                (self._clock.boot, self._clock.now(), device, device.partition(":")[0]),
            ).fetchone()
            if row is None:
                return None
            job_id, name = row
            (counter,) = execute("SELECT value FROM counters WHERE name = 'fencing_token'").fetchone()
            token = max(counter, floor(name)) + 1
            execute("UPDATE counters SET value = ? WHERE name = 'fencing_token'", (token,))
            execute(
                "UPDATE jobs SET state = 'RUNNING', lease_owner = ?, fencing_token = ?, device = ?,"
                " attempt = attempt + 1, started_ms = coalesce(started_ms, ?), message = 'starting',"
                " eta_s = NULL WHERE job_id = ?",
                (owner, token, device, self._clock.wall_ms(), job_id),
            )
            return self._job(job_id), Lease(job_id, owner, token)

    def progress(
        self, lease: Lease, message: str, done: int, total: int, eta_s: float | None, *, is_publishing: bool
    ) -> None:
        """Tell how far a job is. A job that publishes does not go back to running."""
        self._guarded(
            lease,
            "message = ?, done = ?, total = ?, eta_s = ?,"
            " state = CASE WHEN ? OR state = 'PUBLISHING' THEN 'PUBLISHING' ELSE 'RUNNING' END",
            (message, done, total, eta_s, is_publishing),
        )

    def end(self, lease: Lease, state: State, message: str, artifact_version: str = "") -> None:
        """A job has come to its end."""
        if not state.has_ended:
            raise ValueError(f"{state} is no end")
        self._guarded(
            lease,
            "state = ?, message = ?, artifact_version = ?, ended_ms = ?, eta_s = NULL, lease_owner = NULL,"
            " done = CASE WHEN ?1 = 'SUCCEEDED' THEN total ELSE done END",
            (state.value, message, artifact_version, self._clock.wall_ms()),
        )

    def requeue(self, lease: Lease, message: str, delay_s: float, *, is_crash: bool) -> None:
        """Give a job back to the queue, to be claimed again after `delay_s`. One that was cancelled ends."""
        self._guarded(
            lease,
            "state = CASE WHEN is_cancelled THEN 'CANCELLED' ELSE 'QUEUED' END,"
            " message = CASE WHEN is_cancelled THEN 'cancelled' ELSE ? END,"
            " ended_ms = CASE WHEN is_cancelled THEN ? END,"
            " lease_owner = NULL, eta_s = NULL, not_before = ?, not_before_boot = ?, crashes = crashes + ?",
            (
                *(message, self._clock.wall_ms()),
                *(self._clock.now() + delay_s, self._clock.boot, is_crash),
            ),
        )

    def save_log(self, lease: Lease, lines: Sequence[str]) -> None:
        """Keep the last lines of a job in place of those before."""
        with self._transaction() as execute:
            row = execute(
                "SELECT sequence FROM jobs WHERE job_id = ? AND lease_owner = ? AND fencing_token = ?",
                (lease.job_id, lease.owner, lease.token),
            ).fetchone()
            if row is None:
                raise LeaseLost(lease.job_id)
            execute("DELETE FROM log_lines WHERE sequence = ?", row)
            self._connection.executemany(
                "INSERT INTO log_lines VALUES (?, ?, ?)",
                [(row[0], number, line) for number, line in enumerate(lines)],
            )

    def version(self) -> int:
        """A number that changes when another process has changed something."""
        (number,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(number)

    def _guarded(self, lease: Lease, assignments: str, values: tuple[Any, ...]) -> None:
        with self._transaction() as execute:
            changed = execute(
                f"UPDATE jobs SET {assignments} WHERE job_id = ? AND lease_owner = ? AND fencing_token = ?"
                f" AND {_LIVE}",
                (*values, lease.job_id, lease.owner, lease.token),
            ).rowcount
            if changed != 1:
                raise LeaseLost(lease.job_id)

    def _job(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job is None:
            raise KeyError(job_id)
        return job


def _job_of(row: tuple[Any, ...]) -> Job:
    job = Job(*row)
    values = {name: getattr(job, name) for name in Job.__slots__}
    return Job(**{**values, "state": State(job.state), "is_cancelled": bool(job.is_cancelled)})
