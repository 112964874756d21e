"""The live requests by their ids. Knows neither engines nor calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from services.gateway.sessions.turn import Turn
from services.gateway.streams.live import LiveRequest
from services.gateway.streams.resumption import Key, Remnant
from weft.rpc.errors import StatusError


@dataclass(eq=False, slots=True)
class Entry:
    """A live id. `live` is None while the request is being resolved; a cancel may come before that.

    `opened` gives the request of a resumable one, whose `digest` is its body's, and `num_calls` are at it.
    `before` is what it goes on with. While no call is at a resumable request, this is what is kept of it.
    """

    key: Key
    before: Remnant | None = None
    digest: bytes = b""
    opened: asyncio.Future[LiveRequest] | None = None
    num_calls: int = 0
    live: LiveRequest | None = None
    # The session's turn that the request is, if it is one.
    turn: Turn | None = None
    is_cancelled: bool = False

    @property
    def num_bytes(self) -> int:
        """About how much memory the request takes."""
        return self.live.num_bytes if self.live is not None else 0

    def expire(self) -> None:
        """Nobody came back in time: what still runs is cancelled."""
        if self.live is not None:
            self.live.fail(StatusError(grpc.StatusCode.CANCELLED, "nobody came back for the request"))


class Entries:
    """Live ids; one key's ids are not another's."""

    def __init__(self) -> None:
        self._entries: dict[Key, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries.values()))

    def get(self, key: Key) -> Entry | None:
        """The live one of this id."""
        return self._entries.get(key)

    def claim(self, entry: Entry) -> None:
        """Make the entry the one of its id. Raises StatusError when another one is."""
        if self._entries.setdefault(entry.key, entry) is not entry:
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS, "a live request has this id", reason="REQUEST_ID_IN_USE"
            )

    def release(self, entry: Entry) -> None:
        """Free the id, if it is this entry's. May come twice."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]

    def cancel(self, key: Key) -> None:
        """End a live request. Raises StatusError when there is none."""
        entry = self._entries.get(key)
        if entry is None:
            raise StatusError(grpc.StatusCode.NOT_FOUND, "no live request has this id")
        entry.is_cancelled = True
        if entry.live is not None:
            entry.live.cancel()
