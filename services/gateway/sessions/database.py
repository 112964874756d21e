"""Sessions in SQLite: what is asked of the tables in schema.py, their exact token ids turn by turn.

Used from one thread; `SessionStore` is what others call. Each method is one transaction, durable when it
returns. Knows neither text nor engines.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from services.gateway.sessions.schema import open_database

MAX_SWEPT = 1000
_TOKEN = "I"
_COLUMNS = "number, owner, session_id, model, version, artifact_digest, used_ms, num_tokens, num_turns, roles"


class SessionExists(Exception):
    """The owner has a session of this name."""


class NoRoom(Exception):
    """A limit is reached; the text says which."""


class SessionDamaged(Exception):
    """What is kept of a session does not fit together."""


@dataclass(frozen=True, slots=True)
class StoredSession:
    """One row. `roles` are those of every message so far, None once a turn was no chat. `used_ms` is wall
    time: only that outlives a restart.
    """

    number: int
    owner: str
    session_id: str
    model: str
    version: str
    artifact_digest: str
    used_ms: int
    num_tokens: int
    num_turns: int
    roles: tuple[str, ...] | None


class LoadedSession(NamedTuple):
    """A session with its tokens, of which `num_output` at the end are the last turn's output; and whether
    there is room for another turn.
    """

    session: StoredSession
    token_ids: list[int]
    num_output: int
    has_room: bool


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """`ttl_s`: how long a session outlives its last turn. `max_tokens` counts those of all sessions."""

    ttl_s: float = 3600.0
    max_sessions: int = 10_000
    max_sessions_per_key: int = 1000
    max_tokens: int = 64 << 20

    def horizon(self, now_ms: int) -> int:
        """What was used last before this time has expired."""
        return now_ms - int(self.ttl_s * 1000)


class SessionDatabase:
    """One connection. `path` None keeps everything in memory. Raises StoreRefused."""

    def __init__(self, path: Path | None, limits: SessionLimits) -> None:
        self._limits = limits
        self._connection = open_database(path)
        # Other threads may read them.
        self.num_sessions, self.num_tokens = self._connection.execute(
            "SELECT count(*), coalesce(sum(num_tokens), 0) FROM sessions"
        ).fetchone()

    def close(self) -> None:
        """Let the file go."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """All or nothing, the counts included."""
        counts = self.num_sessions, self.num_tokens
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection.execute
            self._connection.execute("COMMIT")
        except BaseException:
            self.num_sessions, self.num_tokens = counts
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def create(self, new: StoredSession, busy: Collection[int]) -> StoredSession:
        """Keep an empty session; its number is drawn here. Raises SessionExists or NoRoom. Makes room first:
        what has expired and is not `busy` goes.
        """
        with self._transaction() as execute:
            self._sweep(execute, new.used_ms, busy)
            if execute(
                "SELECT 1 FROM sessions WHERE owner = ? AND session_id = ?", (new.owner, new.session_id)
            ).fetchone():
                raise SessionExists
            (num_own,) = execute("SELECT count(*) FROM sessions WHERE owner = ?", (new.owner,)).fetchone()
            for limit, what, found in (
                (self._limits.max_sessions, "sessions", self.num_sessions),
                (self._limits.max_sessions_per_key, "sessions of one key", num_own),
            ):
                if found >= limit:
                    raise NoRoom(f"there are {limit} {what}, which is the limit")
            row = execute(
                "INSERT INTO sessions (owner, session_id, model, version, artifact_digest, used_ms, roles)"
                f" VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING {_COLUMNS}",
                (
                    *(new.owner, new.session_id, new.model, new.version, new.artifact_digest),
                    *(new.used_ms, _roles_text(new.roles)),
                ),
            ).fetchone()
            self.num_sessions += 1
        return _session_of(row)

    def get(self, owner: str, session_id: str) -> StoredSession | None:
        """The session, expired or not, or None."""
        row = self._connection.execute(
            f"SELECT {_COLUMNS} FROM sessions WHERE owner = ? AND session_id = ?", (owner, session_id)
        ).fetchone()
        return None if row is None else _session_of(row)

    def load(self, owner: str, session_id: str, *, with_tokens: bool = True) -> LoadedSession | None:
        """The session, expired or not, with its tokens if wanted, or None. Raises SessionDamaged."""
        session = self.get(owner, session_id)
        if session is None:
            return None
        has_room = self.num_tokens < self._limits.max_tokens
        if not with_tokens:
            return LoadedSession(session, [], 0, has_room)
        rows = self._connection.execute(
            "SELECT turn, prompt, output FROM turns WHERE session = ? ORDER BY turn", (session.number,)
        ).fetchall()
        found = array(_TOKEN)
        num_output = 0
        for _, prompt, output in rows:
            found.extend(_unpack(prompt))
            found.extend(_unpack(output))
            num_output = len(output) // found.itemsize
        is_whole = [turn for turn, _, _ in rows] == list(range(session.num_turns))
        if not is_whole or len(found) != session.num_tokens:
            raise SessionDamaged(f"{len(found)} tokens in {len(rows)} turns: not those that were counted")
        return LoadedSession(session, found.tolist(), num_output, has_room)

    def append(
        self,
        session: StoredSession,
        prompt: Sequence[int],
        output: Sequence[int],
        roles: tuple[str, ...] | None,
        now_ms: int,
    ) -> None:
        """Add one turn. Raises SessionDamaged when the session is not as `session` says any more."""
        num_tokens = len(prompt) + len(output)
        with self._transaction() as execute:
            changed = execute(
                "UPDATE sessions SET num_turns = num_turns + 1, num_tokens = num_tokens + ?, roles = ?,"
                " used_ms = ? WHERE number = ? AND num_turns = ?",
                (num_tokens, _roles_text(roles), now_ms, session.number, session.num_turns),
            ).rowcount
            if changed != 1:
                raise SessionDamaged("the session was changed while its turn was running")
            execute(
                "INSERT INTO turns (session, turn, prompt, output) VALUES (?, ?, ?, ?)",
                (session.number, session.num_turns, _pack(prompt), _pack(output)),
            )
            self.num_tokens += num_tokens

    def amend(self, session: StoredSession, output: Sequence[int], num_before: int, now_ms: int) -> None:
        """The turn that was added to `session` has a longer output now; it had `num_before` tokens. Raises
        SessionDamaged when that is not the last turn any more.
        """
        num_more = len(output) - num_before
        with self._transaction() as execute:
            changed = execute(
                "UPDATE sessions SET num_tokens = num_tokens + ?, used_ms = ?"
                " WHERE number = ? AND num_turns = ? AND num_tokens >= ?",
                (num_more, now_ms, session.number, session.num_turns + 1, session.num_tokens + num_before),
            ).rowcount
            if changed != 1:
                raise SessionDamaged("the session was changed while its turn was running")
            execute(
                "UPDATE turns SET output = ? WHERE session = ? AND turn = ?",
                (_pack(output), session.number, session.num_turns),
            )
            self.num_tokens += num_more

    def delete(self, owner: str, session_id: str) -> bool:
        """Forget a session. False when there was none."""
        with self._transaction() as execute:
            row = execute(
                "DELETE FROM sessions WHERE owner = ? AND session_id = ? RETURNING num_tokens",
                (owner, session_id),
            ).fetchone()
            if row is not None:
                self.num_sessions -= 1
                self.num_tokens -= row[0]
        if row is not None:
            self._empty_log()
        return row is not None

    def sweep(self, now_ms: int, busy: Collection[int]) -> int:
        """Forget what has expired, but for the sessions whose numbers are in `busy`: how many went."""
        with self._transaction() as execute:
            num_gone = self._sweep(execute, now_ms, busy)
        if num_gone:
            self._empty_log()
        return num_gone

    def _empty_log(self) -> None:
        """Leave nothing of what was deleted in the write-ahead log. If that fails now, it is done later."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _sweep(self, execute: Callable[..., sqlite3.Cursor], now_ms: int, busy: Collection[int]) -> int:
        rows = execute(
            "SELECT number, num_tokens FROM sessions WHERE used_ms < ? ORDER BY used_ms LIMIT ?",
            (self._limits.horizon(now_ms), MAX_SWEPT + len(busy)),
        ).fetchall()
        gone = [(number, num_tokens) for number, num_tokens in rows if number not in busy]
        for number, num_tokens in gone:
            execute("DELETE FROM sessions WHERE number = ?", (number,))
            self.num_sessions -= 1
            self.num_tokens -= num_tokens
        return len(gone)


def _session_of(row: tuple[Any, ...]) -> StoredSession:
    number, owner, session_id, model, version, digest, used_ms, num_tokens, num_turns, roles = row
    return StoredSession(
        number=number,
        owner=owner,
        session_id=session_id,
        model=model,
        version=version,
        artifact_digest=digest,
        used_ms=used_ms,
        num_tokens=num_tokens,
        num_turns=num_turns,
        roles=None if roles is None else tuple(json.loads(roles)),
    )


def _roles_text(roles: tuple[str, ...] | None) -> str | None:
    return None if roles is None else json.dumps(roles)


def _pack(token_ids: Iterable[int]) -> bytes:
    """Token ids as unsigned 32-bit integers, little-endian."""
    found = array(_TOKEN, token_ids)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def _unpack(data: bytes) -> array[int]:
    found = array(_TOKEN)
    if len(data) % found.itemsize:
        raise SessionDamaged("half a token")
    found.frombytes(data)
    if sys.byteorder == "big":
        found.byteswap()
    return found
