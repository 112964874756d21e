"""The sessions' database from the event loop: one thread of its own does all reading and writing, in order.

Knows neither requests nor engines.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc

from services.gateway.sessions.database import SessionDamaged, SessionDatabase, SessionLimits
from weft import logs
from weft.rpc.errors import StatusError, new_error_id

RETRY_S = 1.0
T = TypeVar("T")
log = logs.get_logger("gateway.sessions")


class SessionStore:
    """Opens the file at once and blocks until it is checked. Raises StoreRefused. `path` None: in memory."""

    def __init__(self, path: Path | None, limits: SessionLimits) -> None:
        self.limits = limits
        self._is_closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sessions")
        try:
            self._database = self._thread.submit(SessionDatabase, path, limits).result()
        except BaseException:
            self._thread.shutdown()
            raise

    @property
    def counts(self) -> tuple[int, int]:
        """Sessions that are kept, and their tokens."""
        return self._database.num_sessions, self._database.num_tokens

    async def run(self, function: Callable[[SessionDatabase], T]) -> T:
        """Call `function` with the database, after everything that was asked before. What SQLite cannot do
        becomes a StatusError; what else is raised comes out as it is. Once begun it is done, even if nobody
        waits for it any more.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._database)
        except (sqlite3.Error, SessionDamaged) as error:
            raise _status_error(error) from error

    async def close(self) -> None:
        """Let the file go, after everything that was asked before. May come twice."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._database.close)
        self._thread.shutdown(wait=False)


def _status_error(error: Exception) -> StatusError:
    error_id = new_error_id()
    log.failure("sessions cannot be read or written", error, error_id=error_id)
    if isinstance(error, SessionDamaged):
        return StatusError(
            grpc.StatusCode.DATA_LOSS,
            f"the session is damaged, id {error_id}",
            reason="SESSION_DAMAGED",
            error_id=error_id,
        )
    return StatusError(
        grpc.StatusCode.UNAVAILABLE,
        f"sessions cannot be read or written now, id {error_id}",
        retry_after_s=RETRY_S,
        reason="SESSIONS_UNAVAILABLE",
        error_id=error_id,
    )
