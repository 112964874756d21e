"""One call's reading of a live request. Knows neither gRPC nor HTTP: whoever writes to the client asks it.

A call that hangs in a write because its client does not read cannot see that its request has ended. So the
reader knows since when an update is in the writer's hands, and can be called off: the timeout around the
writer's task is then set to now, which costs nothing while nobody is slow.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from services.gateway.request import ResolvedRequest, SampleUpdate
from weft.rpc.errors import StatusError

if TYPE_CHECKING:
    from services.gateway.streams.live import LiveRequest


class Reader:
    """Call `admitted` first, then `next_updates` until None; or `take_updates`, with `sending` for each
    update at its write, and `writing` before a write that comes earlier. `patience` is the timeout around
    the reading task.
    """

    def __init__(self, live: LiveRequest) -> None:
        self.patience: asyncio.Timeout | None = None
        # Since when the writer has been at what it took last, in seconds of the event loop's clock.
        self.given_at: float | None = None
        self._live = live
        # Set by the pacer: there are tokens, but not yet for this reader.
        self.is_held = False
        self._superseded: StatusError | None = None
        self._waiter: asyncio.Future[None] | None = None
        # Asked for once: finding it costs a system call, and this is once per message.
        self._new_future = asyncio.get_running_loop().create_future

    @property
    def resolved(self) -> ResolvedRequest:
        """The request that is read."""
        return self._live.resolved

    @property
    def failure(self) -> StatusError | None:
        """Why the reading ends early, if it does."""
        return self._superseded or self._live.failure

    def wake(self) -> None:
        """Something is new."""
        self.is_held = False
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def cancel(self) -> None:
        """End every sample on the client's wish."""
        self._live.cancel()

    def supersede(self) -> None:
        """Another reader takes over: this one ends."""
        self._superseded = superseded()
        self.wake()
        self.call_off()

    def call_off(self) -> None:
        """Tear the writer out of a write that hangs; its task raises `failure`."""
        if self.given_at is not None and self.patience is not None and not self.patience.expired():
            self.patience.reschedule(self._live.now())

    async def admitted(self) -> None:
        """Return when the engine has taken every sample. Raises StatusError."""
        samples = self._live.samples
        while not all(sample.is_accepted or sample.end is not None for sample in samples):
            if (failure := self.failure) is not None:
                raise failure
            await self._next_wake()
        self.wake()

    def writing(self) -> None:
        """A write begins that is none of an update."""
        self.given_at = self._live.now()

    async def next_updates(self) -> list[SampleUpdate] | None:
        """Like `take_updates`, for a writer that sends what it gets as one piece."""
        updates = await self.take_updates()
        for update in updates or ():
            self.sending(update)
        return updates

    async def take_updates(self) -> list[SampleUpdate] | None:
        """Wait for news: at most one update a sample, everything that came meanwhile in it. None when every
        sample has ended. Raises StatusError when the request failed.
        """
        live = self._live
        samples = live.samples
        self.given_at = None
        while True:
            if self._superseded is not None:
                raise self._superseded
            if not self.is_held:
                if updates := [update for sample in samples if (update := sample.take()) is not None]:
                    self.given_at = live.now()
                    return updates
                if live.failure is not None:
                    raise live.failure
                if all(sample.is_done for sample in samples):
                    return None
            await self._next_wake()

    async def _next_wake(self) -> None:
        """Return at the next `wake`. What was looked at before is up to date: nothing runs between."""
        self._waiter = self._new_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def sending(self, update: SampleUpdate) -> None:
        """This update's write begins now: a resume goes on after it. Raises StatusError when another reader
        has taken over, whose place this would move.
        """
        if self._superseded is not None:
            raise self._superseded
        self._live.samples[update.sample_index].journal.sent(len(update.token_ids), update.next_offset)


def superseded() -> StatusError:
    """Another call has taken the request up: not an error to come back from."""
    return StatusError(grpc.StatusCode.ABORTED, "another call has taken the request up", reason="SUPERSEDED")
