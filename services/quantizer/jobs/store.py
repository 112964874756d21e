"""The database, called from the event loop: one thread of its own does all that touches it. Knows no SQL."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from services.quantizer.jobs.clock import Clock
from services.quantizer.jobs.database import Database

P = ParamSpec("P")
T = TypeVar("T")


class DatabaseUnavailable(Exception):
    """The database is locked by another, or its disk is full: worth another try."""


class JobStore:
    """`await store.run(Database.get, job_id)` calls that method in the database's thread."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobs-database")
        self._database: Database | None = None

    async def open(self) -> None:
        """Open the file. Raises DatabaseRefused."""
        self._database = await self._in_thread(lambda: Database(self._path, self._clock))

    async def run(
        self, method: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The method's result or exception; DatabaseUnavailable for what may pass."""
        database = self._database
        if database is None:
            raise DatabaseUnavailable("the database is closed")
        try:
            return await self._in_thread(lambda: method(database, *args, **kwargs))
        except sqlite3.OperationalError as error:
            raise DatabaseUnavailable(str(error)) from error

    async def close(self) -> None:
        """Close the file once what is under way is done."""
        database, self._database = self._database, None
        if database is not None:
            await self._in_thread(database.close)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
