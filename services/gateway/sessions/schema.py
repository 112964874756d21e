"""The tables of the sessions, and how their file is opened. What is damaged is refused and left as it is.

WAL with synchronous FULL, which is why the file must lie on a disk of its own machine. It is held
exclusively: a second process that opens it is refused.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

SCHEMA_VERSION = 1
APPLICATION_ID = 0x57455353
BUSY_TIMEOUT_S = 2.0
_SCHEMA = """
CREATE TABLE sessions (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  owner TEXT NOT NULL,
  session_id TEXT NOT NULL,
  model TEXT NOT NULL,
  version TEXT NOT NULL,
  artifact_digest TEXT NOT NULL,
  used_ms INTEGER NOT NULL,
  num_tokens INTEGER NOT NULL DEFAULT 0,
  num_turns INTEGER NOT NULL DEFAULT 0,
  roles TEXT,
  UNIQUE (owner, session_id)
) STRICT;
CREATE INDEX sessions_by_use ON sessions (used_ms);
CREATE TABLE turns (
  session INTEGER NOT NULL REFERENCES sessions (number) ON DELETE CASCADE,
  turn INTEGER NOT NULL,
  prompt BLOB NOT NULL,
  output BLOB NOT NULL,
  PRIMARY KEY (session, turn)
) STRICT;
"""


class StoreRefused(ValueError):
    """A file that cannot be used: damaged, foreign, from another version, or in use."""


def open_database(path: Path | None) -> sqlite3.Connection:
    """A connection in autocommit mode; the file is made if there is none, for nobody else to read.
    Raises StoreRefused.
    """
    name = ":memory:" if path is None else str(path)
    try:
        if path is not None:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(name, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    except (OSError, sqlite3.Error) as error:
        raise StoreRefused(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    try:
        _prepare(connection, name)
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreRefused(f"{name}: another process has it open") from error
        raise StoreRefused(f"{name}: {error}") from error
    except sqlite3.DatabaseError as error:
        connection.close()
        raise StoreRefused(
            f"{name}: {error}; nothing was changed: restore a copy, or move it away to begin anew"
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, name: str) -> None:
    execute = connection.execute
    execute("PRAGMA locking_mode = EXCLUSIVE")
    (found,) = execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(" ".join(str(found).split()))
    (application,) = execute("PRAGMA application_id").fetchone()
    (version,) = execute("PRAGMA user_version").fetchone()
    (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise StoreRefused(f"{name}: not a file of sessions")
    if tables and version != SCHEMA_VERSION:
        raise StoreRefused(f"{name}: its schema is version {version}, this program's {SCHEMA_VERSION}")
    execute("PRAGMA journal_mode = WAL")
    execute("PRAGMA synchronous = FULL")
    execute("PRAGMA foreign_keys = ON")
    execute("PRAGMA secure_delete = ON")  # a deleted conversation is overwritten, not only unlinked
    if not tables:
        connection.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
            f" PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    execute("BEGIN IMMEDIATE")  # takes the lock that no other process gets from now on
    execute("COMMIT")
