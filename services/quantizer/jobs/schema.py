"""The tables of the jobs, and how their file is opened. What is damaged is refused and left as it is."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from services.quantizer.jobs.job import DatabaseRefused

SCHEMA_VERSION = 1
APPLICATION_ID = 0x57454654
BUSY_TIMEOUT_MS = 5000
_SCHEMA = """
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
INSERT INTO counters VALUES ('fencing_token', 0);
CREATE TABLE owners (owner TEXT PRIMARY KEY, boot TEXT NOT NULL, expires REAL NOT NULL) STRICT;
CREATE TABLE jobs (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT,
  job_id TEXT NOT NULL UNIQUE,
  caller TEXT NOT NULL,
  request_id TEXT NOT NULL,
  body_digest TEXT NOT NULL,
  name TEXT NOT NULL,
  spec TEXT NOT NULL,
  wanted_device TEXT NOT NULL,
  state TEXT NOT NULL
    CHECK (state IN ('QUEUED', 'RUNNING', 'PUBLISHING', 'SUCCEEDED', 'FAILED', 'CANCELLED')),
  message TEXT NOT NULL DEFAULT 'waits for a device',
  done INTEGER NOT NULL DEFAULT 0,
  total INTEGER NOT NULL DEFAULT 0,
  eta_s REAL,
  attempt INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0,
  device TEXT NOT NULL DEFAULT '',
  is_cancelled INTEGER NOT NULL DEFAULT 0,
  artifact_version TEXT NOT NULL DEFAULT '',
  created_ms INTEGER NOT NULL,
  started_ms INTEGER,
  ended_ms INTEGER,
  not_before REAL NOT NULL DEFAULT 0,
  not_before_boot TEXT NOT NULL DEFAULT '',
  lease_owner TEXT REFERENCES owners (owner),
  fencing_token INTEGER NOT NULL DEFAULT 0,
  UNIQUE (caller, request_id),
  CHECK ((lease_owner IS NOT NULL) = (state IN ('RUNNING', 'PUBLISHING')))
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, sequence);
CREATE TABLE log_lines (
  sequence INTEGER NOT NULL REFERENCES jobs (sequence) ON DELETE CASCADE,
  number INTEGER NOT NULL,
  line TEXT NOT NULL,
  PRIMARY KEY (sequence, number)
) STRICT;
"""


def open_database(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode to the file, made if there is none. Raises DatabaseRefused when it is
    damaged, foreign or from another version.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_MS / 1000)
    except sqlite3.Error as error:
        raise DatabaseRefused(f"{path}: {error}") from error
    try:
        _prepare(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise DatabaseRefused(
            f"{path}: {error}; nothing was changed: restore a copy, or move it away to begin anew"
        ) from error
    except DatabaseRefused:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    execute = connection.execute
    (found,) = execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(" ".join(str(found).split()))
    (application,), (version,) = (
        execute("PRAGMA application_id").fetchone(),
        execute("PRAGMA user_version").fetchone(),
    )
    (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise DatabaseRefused(f"{path}: not a database of jobs")
    if tables and version != SCHEMA_VERSION:
        raise DatabaseRefused(f"{path}: its schema is version {version}, this program's {SCHEMA_VERSION}")
    execute("PRAGMA journal_mode = WAL")
    execute("PRAGMA synchronous = FULL")
    execute("PRAGMA foreign_keys = ON")
    if not tables:
        connection.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
            f" PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
