"""A request in flight: all its samples, and the reader that takes from them.

Tokens are taken in as frames come, at the engine's pace; updates are given out at the reader's. Between the
two the text is coalesced, and a reader that falls behind pauses its own slots and nobody else's. A request
may have no reader for a while: what it draws then is in its journals. Knows neither gRPC nor HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from services.gateway.request import ResolvedRequest
from services.gateway.streams.one_shot import OneShot
from services.gateway.streams.pacing import AT_ONCE, Pacer
from services.gateway.streams.reader import Reader, superseded
from services.gateway.streams.sample import LiveSample
from weft.rpc.errors import StatusError

if TYPE_CHECKING:
    from services.gateway.sessions.turn import Turn

__all__ = ["LiveRequest", "LiveSample"]


class LiveRequest:
    """All samples of one request, and the one reader that it has, or has not.

    With `is_resumable` every offset that was sent is a place to go on from. `on_failure` may replace the
    error that ends the request. `over` is set when nothing is left to be done for it: it failed, or every
    sample has ended and no reader is at it. With `before` it goes on where a request that failed stopped.
    """

    def __init__(
        self,
        resolved: ResolvedRequest,
        now: Callable[[], float],
        on_first_token: Callable[[], None] = lambda: None,
        *,
        is_resumable: bool = False,
        on_failure: Callable[[StatusError], StatusError] = lambda error: error,
        before: LiveRequest | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self.resolved = resolved
        self.now = now
        self.on_first_token = on_first_token
        self.is_resumable = is_resumable
        olds: Sequence[LiveSample | None] = before.samples if before else [None] * resolved.num_samples
        self.samples: list[LiveSample] = [LiveSample(self, index, old) for index, old in enumerate(olds)]
        self.failure: StatusError | None = None
        self.is_closed = False
        self.has_tokens = False
        self.reader: Reader | None = None
        # The session's turn that this request is, if it is one.
        self.turn: Turn | None = None
        self.over = OneShot()
        self._on_failure = on_failure
        self.pacer = pacer or AT_ONCE

    @property
    def has_output(self) -> bool:
        """Whether a token has come, for this request or the one that it goes on with."""
        return any(sample.token_ids for sample in self.samples)

    @property
    def is_ended(self) -> bool:
        """Whether every sample has its end."""
        return all(sample.end is not None for sample in self.samples)

    @property
    def num_bytes(self) -> int:
        """About how much memory this takes."""
        prompt = 36 * len(self.resolved.prompt_token_ids)
        return 2048 + prompt + sum(sample.journal.num_bytes for sample in self.samples)

    def forget_call(self) -> None:
        """It has ended and is kept: let go of what only its life needed, the client's own message first."""
        self.on_first_token = lambda: None
        self._on_failure = lambda error: error

    def wake(self) -> None:
        """Something is new for the reader."""
        if self.reader is not None:
            self.reader.wake()

    def on_sample_end(self) -> None:
        """One sample has its end."""
        self.wake()
        self._look_if_over()

    def fail(self, error: StatusError) -> None:
        """End the request with `error`, once what its samples have so far is delivered. The first error
        stays.
        """
        if self.failure is None and not self.is_closed:
            self.failure = self._on_failure(error)
            self._detach()
            self.over.set()
            self.wake()

    def supersede(self) -> None:
        """End the request, and a write of its reader that hangs, because another one goes on in its place."""
        self.fail(superseded())
        if self.reader is not None:
            self.reader.supersede()

    def cancel(self) -> None:
        """End every sample on the client's wish, with FINISH_REASON_CANCELLED."""
        for sample in self.samples:
            sample.cancel()

    def close(self) -> None:
        """Nothing more is wanted of the engine: what still runs is cancelled. May come twice."""
        self.is_closed = True
        self._detach()
        self.over.set()

    def attach(self, places: Sequence[tuple[int, int]] | None = None) -> Reader:
        """A reader from the beginning, or at one place of each sample's journal: tokens, and offset. It takes
        the place of one that was there before.
        """
        if self.reader is not None:
            self.reader.supersede()
        self.reader = Reader(self)
        for sample, (num_tokens, offset) in zip(self.samples, places or (), strict=False):
            sample.rewind(num_tokens, offset)
        return self.reader

    def leave(self, reader: Reader) -> bool:
        """A reader has gone; samples that it had paused go on. False: another has taken its place."""
        if self.reader is not reader:
            return False
        self.reader = None
        for sample in self.samples:
            sample.go_on()
        self._look_if_over()
        return True

    def _look_if_over(self) -> None:
        if self.reader is None and self.is_ended:
            self.over.set()

    def _detach(self) -> None:
        for sample in self.samples:
            sample.detach()
