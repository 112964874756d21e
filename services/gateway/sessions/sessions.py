"""Sessions: conversations whose exact tokens the gateway keeps, so that a client sends only the new turn.

One turn of a session is live at a time. A session belongs to its key and to one artifact. Knows neither text
nor SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Callable

import grpc

from services.gateway.sessions.database import (
    LoadedSession,
    NoRoom,
    SessionDatabase,
    SessionExists,
    SessionLimits,
    StoredSession,
)
from services.gateway.sessions.store import SessionStore
from services.gateway.sessions.turn import Turn, full_name
from services.gateway.sessions.turn_prompt import Kept
from weft import logs
from weft.rpc.errors import StatusError, invalid_argument
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as gateway_pb

MAX_ID_CHARS = 128
MAX_SWEEP_INTERVAL_S = 60.0
MIN_SWEEP_INTERVAL_S = 0.05
NO_ROOM_RETRY_S = 60.0
# How long a call that goes on with a turn waits for the call before it to leave.
GIVE_UP_S = 1.0
_SESSION_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_ID_CHARS}}}")
_Key = tuple[str, str]
log = logs.get_logger("gateway.sessions")


class WallClock:
    """Milliseconds since 1970: only that outlives a restart. While the process lives it goes on evenly, so
    that setting the machine's clock expires nothing.
    """

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def __call__(self) -> int:
        return int((self._offset_s + time.monotonic()) * 1000)


class Sessions:
    """All sessions of this process. `now_ms` is wall time, in milliseconds."""

    def __init__(
        self,
        store: SessionStore,
        *,
        retain_seconds: int = 300,
        now_ms: Callable[[], int] | None = None,
    ) -> None:
        self.store = store
        self.retain_seconds = retain_seconds
        self.now_ms = now_ms or WallClock()
        # None: a turn that is still being looked up.
        self._live: dict[_Key, Turn | None] = {}

    @property
    def limits(self) -> SessionLimits:
        """What is refused, and when a session expires."""
        return self.store.limits

    @property
    def num_live(self) -> int:
        """Turns that are live or being kept."""
        return len(self._live)

    async def create(
        self, owner: str | None, session_id: str, info: engine_pb.GetInfoResponse
    ) -> StoredSession:
        """A new, empty session of the artifact that `info` names; an empty id is chosen here. Raises
        StatusError.
        """
        new = StoredSession(
            number=0,
            owner=owner or "",
            session_id=_checked(session_id) if session_id else uuid.uuid4().hex,
            model=info.model_name,
            version=info.artifact_version,
            artifact_digest=info.artifact_digest,
            used_ms=self.now_ms(),
            num_tokens=0,
            num_turns=0,
            roles=(),
        )
        busy = self._busy()
        try:
            return await self.store.run(lambda database: database.create(new, busy))
        except SessionExists:
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS, "this key has a session of this id", reason="SESSION_EXISTS"
            ) from None
        except NoRoom as error:
            raise _no_room(str(error)) from None

    async def get(
        self, owner: str | None, session_id: str, *, with_tokens: bool = True
    ) -> tuple[StoredSession, list[int]]:
        """A session and its tokens, if wanted, as its last kept turn left it. Raises StatusError."""
        key = (owner or "", _checked(session_id))
        await self._settled(key)
        found = await self._load(key, with_tokens=with_tokens)
        return found.session, found.token_ids

    async def delete(self, owner: str | None, session_id: str) -> None:
        """Forget a session. Raises StatusError, also while a turn is live."""
        key = (owner or "", _checked(session_id))
        await self._claim(key)
        try:
            if not await asyncio.shield(self.store.run(lambda database: database.delete(*key))):
                raise _unknown()
        finally:
            del self._live[key]

    async def begin(self, request: gateway_pb.GenerateRequest, owner: str | None) -> Turn:
        """Begin a turn; `close` must follow. Raises StatusError."""
        key = (owner or "", _checked(request.session_id))
        if request.sampling.n > 1:
            raise invalid_argument([("sampling.n", "must be 1 in a session")])
        await self._claim(key)
        turn: Turn | None = None
        try:
            found = await self._load(key)
            session = found.session
            if request.model not in ("", session.model, full_name(session)):
                raise invalid_argument([("model", f"the session belongs to {full_name(session)[:80]}")])
            if not found.has_room:
                raise _no_room(f"all sessions hold {self.limits.max_tokens} tokens, which is the limit")
            kept = Kept(found.token_ids, found.num_output, session.roles)
            self._live[key] = turn = Turn(self, session, kept)
            return turn
        finally:
            if turn is None:
                del self._live[key]

    async def begin_again(self, old: Turn) -> Turn:
        """Go on with a turn that is over because its request had failed. Raises StatusError when the session
        has gone on without it.
        """
        key = (old.session.owner, old.session.session_id)
        await self._left(key)
        await self._claim(key)
        turn: Turn | None = None
        try:
            session = (await self._load(key, with_tokens=False)).session
            num_turns = old.session.num_turns + old.has_output
            if (session.number, session.num_turns) != (old.session.number, num_turns):
                raise StatusError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "the session has gone on without this turn",
                    reason="SESSION_CHANGED",
                )
            self._live[key] = turn = old.again()
            return turn
        finally:
            if turn is None:
                del self._live[key]

    async def keep(self, change: Callable[[SessionDatabase, int], None]) -> None:
        """Change the database, as a turn that is over asks for it. Raises StatusError."""
        now_ms = self.now_ms()
        await self.store.run(lambda database: change(database, now_ms))

    def forget(self, turn: Turn) -> None:
        """The turn is over, and kept as far as it can be: its session is free."""
        key = (turn.session.owner, turn.session.session_id)
        turn.left.set()
        if self._live.get(key) is turn:
            del self._live[key]

    async def sweep(self) -> None:
        """Forget what has expired. Runs until cancelled."""
        while True:
            interval_s = min(MAX_SWEEP_INTERVAL_S, self.limits.ttl_s / 4)
            await asyncio.sleep(max(MIN_SWEEP_INTERVAL_S, interval_s))
            now_ms, busy = self.now_ms(), self._busy()
            try:
                num_gone = await self.store.run(lambda database: database.sweep(now_ms, busy))  # noqa: B023
            except StatusError:
                continue  # logged; the next round tries again
            if num_gone:
                log.info("sessions expired", sessions=num_gone)

    async def close(self) -> None:
        """Keep what is over, then let the file go. No turn may begin any more."""
        saving = [turn.saving for turn in self._live.values() if turn is not None and turn.saving is not None]
        await asyncio.gather(*saving, return_exceptions=True)
        await self.store.close()

    async def _claim(self, key: _Key) -> None:
        """Take the session for oneself: it is in `_live` after this."""
        await self._settled(key)
        if key in self._live:
            raise StatusError(
                grpc.StatusCode.ABORTED, "a turn of this session is live", reason="SESSION_BUSY"
            )
        self._live[key] = None

    async def _left(self, key: _Key) -> None:
        """Wait a moment for a turn that is being given up: a call that goes on takes the place of another."""
        turn = self._live.get(key)
        if turn is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GIVE_UP_S):
                    await turn.left.wait()

    async def _settled(self, key: _Key) -> None:
        """Wait for a turn that is over to be kept."""
        while (turn := self._live.get(key)) is not None and turn.saving is not None:
            await asyncio.wait([turn.saving])

    async def _load(self, key: _Key, *, with_tokens: bool = True) -> LoadedSession:
        found = await self.store.run(lambda database: database.load(*key, with_tokens=with_tokens))
        # A live turn keeps its session from expiring.
        if found is None or (
            found.session.used_ms < self.limits.horizon(self.now_ms()) and self._live.get(key) is None
        ):
            raise _unknown()
        return found

    def _busy(self) -> frozenset[int]:
        return frozenset(turn.session.number for turn in self._live.values() if turn is not None)


def _checked(session_id: str) -> str:
    if not _SESSION_ID.fullmatch(session_id):
        raise invalid_argument([("session_id", f"must be 1 to {MAX_ID_CHARS} of A-Z a-z 0-9 . _ -")])
    return session_id


def _unknown() -> StatusError:
    return StatusError(grpc.StatusCode.NOT_FOUND, "this key has no such session", reason="SESSION_NOT_FOUND")


def _no_room(text: str) -> StatusError:
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, text, retry_after_s=NO_ROOM_RETRY_S, reason="SESSION_LIMIT"
    )
