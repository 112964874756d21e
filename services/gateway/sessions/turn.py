"""One turn of a session: which artifact it needs, which tokens it goes on from, and what is kept of it.

Prompt and output are kept at once when the turn is over: of an output that came to its end all tokens through
it, of one that was cut short those that were sent to the client, and of a turn without output nothing. Knows
neither how sessions are found nor how they are stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc

from services.gateway.sessions.database import SessionDatabase, StoredSession
from services.gateway.sessions.turn_prompt import Kept, TurnPrompt, turn_prompt
from services.gateway.text.assets import ModelAssets
from weft.rpc.errors import StatusError
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as gateway_pb

if TYPE_CHECKING:
    from services.gateway.streams.live import LiveRequest


class HasInfo(Protocol):
    """What a router finds for a model."""

    @property
    def info(self) -> engine_pb.GetInfoResponse | None:
        """What its engine says of itself."""


Found = TypeVar("Found", bound=HasInfo)


@dataclass(slots=True)
class _Progress:
    """What is kept of a turn, which may be gone on with several times after its request had failed."""

    num_output: int = 0


class Keeper(Protocol):
    """What a turn asks of the sessions."""

    retain_seconds: int

    async def keep(self, change: Callable[[SessionDatabase, int], None]) -> None:
        """Change the database; the second argument is the time in milliseconds. Raises StatusError."""

    def forget(self, turn: Turn) -> None:
        """The turn is over, and kept as far as it can be: its session is free."""


class Turn:
    """One turn, from `Sessions.begin` to `close`; nobody else has the session meanwhile."""

    def __init__(self, keeper: Keeper, session: StoredSession, kept: Kept) -> None:
        self.session = session
        self.saving: asyncio.Task[None] | None = None
        self.is_closed = False
        self._keeper = keeper
        self._kept = kept
        self._prompt: TurnPrompt | None = None
        self._progress = _Progress()
        # Set when the session is free of this turn.
        self.left = asyncio.Event()

    @property
    def affinity(self) -> str:
        """Names the session among those of all keys: its engine may still hold what was computed."""
        return f"{self.session.owner}/{self.session.session_id}"

    @property
    def retain_seconds(self) -> int:
        """How long the engine is asked to keep what it computed."""
        return self._keeper.retain_seconds

    @property
    def has_output(self) -> bool:
        """Whether something of this turn is kept."""
        return self._progress.num_output > 0

    async def find(
        self, find_soon: Callable[[str, float | None], Awaitable[Found]], deadline: float | None
    ) -> Found:
        """What the router finds for the session's artifact. Raises StatusError: FAILED_PRECONDITION when that
        artifact is not served any more.
        """
        session = self.session
        try:
            found = await find_soon(f"{session.model}@{session.version}", deadline)
        except StatusError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                raise _version_gone(session) from error
            raise
        if found.info is not None and found.info.artifact_digest != session.artifact_digest:
            raise _version_gone(session)
        return found

    async def prompt(
        self, request: gateway_pb.GenerateRequest, assets: ModelAssets, info: engine_pb.GetInfoResponse
    ) -> list[int]:
        """All tokens to go on from: what is kept and what `request` adds. Raises StatusError."""
        self._prompt = await turn_prompt(request, self._kept, assets, info)
        return self._kept.token_ids + self._prompt.token_ids

    def again(self) -> Turn:
        """The same turn, to be gone on with; its output so far stays."""
        turn = Turn(self._keeper, self.session, self._kept)
        turn._prompt, turn._progress = self._prompt, self._progress
        return turn

    def close(self, output_token_ids: Sequence[int]) -> None:
        """The turn is over: keep it if it brought a token. May come twice; never fails. It is kept in the
        background, and the session's next turn waits for that.
        """
        if self.is_closed:
            return
        self.is_closed = True
        prompt = self._prompt
        if prompt is None or len(output_token_ids) <= self._progress.num_output:
            self._keeper.forget(self)
            return
        self.saving = asyncio.get_running_loop().create_task(self._save(prompt, list(output_token_ids)))
        # Logged where it happened; nobody need wait for it.
        self.saving.add_done_callback(lambda saving: saving.cancelled() or saving.exception())

    async def saved(self) -> None:
        """After `close`: return when the turn is kept. Raises StatusError when it could not be: then the
        session is as before.
        """
        if self.saving is not None:
            await asyncio.shield(self.saving)

    async def _save(self, prompt: TurnPrompt, output: list[int]) -> None:
        session, num_before = self.session, self._progress.num_output

        def change(database: SessionDatabase, now_ms: int) -> None:
            if num_before:
                database.amend(session, output, num_before, now_ms)
            else:
                database.append(session, prompt.token_ids, output, prompt.roles, now_ms)

        try:
            await self._keeper.keep(change)
            self._progress.num_output = len(output)
        finally:
            self._keeper.forget(self)


def tokens_to_keep(request: LiveRequest) -> Sequence[int]:
    """What of a request's output belongs to its session: through its end when it has come to one, else what
    was sent to the client.
    """
    (sample,) = request.samples
    num_tokens = sample.output.num_tokens if sample.end is not None else sample.journal.most_sent
    return sample.token_ids[:num_tokens]


def end_turn(turn: Turn | None, request: LiveRequest | None, *, is_read: bool = False) -> None:
    """Close the turn of a request that is over, once nobody reads it any more. May come several times."""
    if turn is not None and (request is None or request.reader is None or is_read):
        turn.close(() if request is None else tokens_to_keep(request))


def full_name(session: StoredSession) -> str:
    """The artifact that a session belongs to, for people."""
    return f"{session.model}@{session.version}" if session.version else session.model


def _version_gone(session: StoredSession) -> StatusError:
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"the session's tokens belong to {full_name(session)[:80]!r}, which is not served any more",
        reason="SESSION_VERSION_GONE",
    )
