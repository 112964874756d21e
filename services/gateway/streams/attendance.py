"""Which calls are at which request: beginning, reading, leaving, coming back, being given up.

A usual request lives inside its call. A resumable one lives in a task of its own; calls come to it and go,
one at a time, and while none is there it is an orphan. What a request goes through in its life is not known
here: `life` is.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc

from services.gateway.counters import RequestCounters
from services.gateway.permissions import check_model
from services.gateway.sessions.turn import end_turn
from services.gateway.streams.entries import Entries, Entry
from services.gateway.streams.live import LiveRequest
from services.gateway.streams.orphans import Retention, RetentionLimits
from services.gateway.streams.reader import Reader
from services.gateway.streams.resumption import (
    RESUMED_CODES,
    Remnants,
    body_differs,
    check_resume_fields,
    check_token_body,
    digest_of,
    is_about_resuming,
    last_places,
    not_kept,
    offsets_are_zero,
    places,
    with_token,
)
from weft import logs
from weft.rpc.auth import Caller
from weft.rpc.errors import RESUME_TOKEN, StatusError, new_error_id
from weft.v1 import gateway_service_pb2 as gateway_pb

Places = Sequence[tuple[int, int]]
Life = Callable[
    [Entry, gateway_pb.GenerateRequest, Caller, float | None], AbstractAsyncContextManager[LiveRequest]
]
log = logs.get_logger("gateway")


def stopping() -> StatusError:
    """This gateway takes nothing more."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE, "the gateway is stopping", retry_after_s=1.0, reason="DRAINING"
    )


class Attendance:
    """The calls at the requests of one gateway. `renew` says what a key may do now; `pass_by` raises when it
    may not come to a request that is live.
    """

    def __init__(
        self,
        life: Life,
        entries: Entries,
        counters: RequestCounters,
        limits: RetentionLimits,
        *,
        renew: Callable[[Caller], Caller],
        pass_by: Callable[[Caller], None],
    ) -> None:
        self.is_closed = False
        # Orphans, which still run, and what is left of requests that have ended.
        self.retention = Retention(limits)
        self.remnants = Remnants(self.retention)
        self.readers: dict[Reader, LiveRequest] = {}
        self.keepers: set[asyncio.Task[None]] = set()
        self._life = life
        self._entries = entries
        self._counters = counters
        self._renew = renew
        self._pass_by = pass_by

    @asynccontextmanager
    async def open(
        self, request: gateway_pb.GenerateRequest, caller: Caller, budget_s: float | None
    ) -> AsyncIterator[Reader]:
        """One call: begin a request, or come to one, and read it. Raises StatusError."""
        if not is_about_resuming(request):
            entry, where = Entry((caller.name, request.request_id or uuid.uuid4().hex)), None
        else:
            with self._counters.refusals():
                if self.is_closed:
                    raise stopping()
                check_resume_fields(request)
                entry, where = self._find(request, caller)
                if entry.num_calls >= 0 and entry.opened is not None:
                    self._pass_by(self._renew(caller))
        if entry.opened is None:
            async with self._life(entry, request, caller, budget_s) as live:
                async with self._reading(live, where) as reader:
                    yield reader
            if entry.before is not None:
                self.remnants.drop(entry.before)
            return
        if entry.num_calls < 0:
            self._begin_keeping(entry, request, caller, budget_s)
        async with self._coming_to(entry, caller) as live:
            with self._counters.refusals():
                where = where or places(request, live)
            async with self._reading(live, where) as reader:
                yield reader

    @asynccontextmanager
    async def _coming_to(self, entry: Entry, caller: Caller) -> AsyncIterator[LiveRequest]:
        """A call is at a resumable request; without one it is an orphan."""
        if entry.opened is None:
            raise ValueError("the request is not resumable")
        is_begun = entry.opened.done()
        entry.num_calls += 1
        self.retention.release(entry)
        try:
            live = await asyncio.shield(entry.opened)
            if is_begun:
                info = live.resolved.info
                check_model(self._renew(caller), info.model_name, info.artifact_version)
                self._counters.resumes["attached"] += 1
            yield live
        finally:
            entry.num_calls -= 1
            self._look_if_orphaned(entry)

    @asynccontextmanager
    async def _reading(self, live: LiveRequest, where: Places | None) -> AsyncIterator[Reader]:
        """A write that hangs is called off when the reading must end."""
        reader = live.attach(where)
        self.readers[reader] = live
        try:
            async with asyncio.timeout(None) as reader.patience:
                yield reader
            if live.turn is not None and live.is_ended:
                # The end of the call says that the turn is kept.
                end_turn(live.turn, live, is_read=True)
                await live.turn.saved()
        except TimeoutError:
            if reader.patience is None or not reader.patience.expired() or reader.failure is None:
                raise
            raise reader.failure from None
        finally:
            del self.readers[reader]
            live.leave(reader)
            if live.is_closed:
                end_turn(live.turn, live)

    def _find(self, request: gateway_pb.GenerateRequest, caller: Caller) -> tuple[Entry, Places | None]:
        """The entry of a request that is to be resumable or is taken up, and where its token says to go on.
        Of a new entry `num_calls` is below 0 until it begins. Raises StatusError.
        """
        where = None
        if request.resume_token:
            remnant = self.remnants.by_token(caller.name, request.resume_token)
            if remnant is None:
                raise not_kept("resume_token")
            check_token_body(request, remnant)
            key, digest, is_resumable = remnant.key, remnant.digest, remnant.live.is_resumable
            where = last_places(remnant.live)
        else:
            key, digest, is_resumable = (caller.name, request.request_id), digest_of(request), True
            remnant = self.remnants.by_key(key)
        entry = self._entries.get(key)
        if entry is not None and entry.opened is not None and entry.digest == digest and is_resumable:
            return entry, where
        if entry is not None:
            if not request.resume_token or entry.before is not remnant or entry.live is None:
                raise body_differs()
            entry.live.supersede()  # the same token once more: the call before it is given up
            self._entries.release(entry)
        if remnant is None:
            if not (request.resumable and offsets_are_zero(request)):
                raise not_kept("request_id")
        elif remnant.digest != digest:
            raise body_differs()
        elif not request.resume_token:
            places(request, remnant.live)
        if remnant is not None:
            remnant.live.supersede()  # a call that has not yet told its client of the end
        entry = Entry(key, remnant, digest)
        if is_resumable:
            entry.opened, entry.num_calls = asyncio.get_running_loop().create_future(), -1
        self._entries.claim(entry)
        return entry, where

    # -- lives that are longer than a call ------------------------------------------------------------

    def _begin_keeping(
        self, entry: Entry, request: gateway_pb.GenerateRequest, caller: Caller, budget_s: float | None
    ) -> None:
        entry.num_calls = 0
        keeper = asyncio.create_task(self._keep_living(entry, request, caller, budget_s))
        self.keepers.add(keeper)
        keeper.add_done_callback(self.keepers.discard)

    async def _keep_living(
        self, entry: Entry, request: gateway_pb.GenerateRequest, caller: Caller, budget_s: float | None
    ) -> None:
        """The life of a resumable request; its outcome is kept for a while."""
        opened = entry.opened
        if opened is None:
            raise ValueError("the request is not resumable")
        # Nobody need be there to hear why it could not begin.
        opened.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with self._life(entry, request, caller, budget_s) as live:
                opened.set_result(live)
                self._look_if_orphaned(entry)
                await live.over.wait()
                if live.failure is not None:
                    raise live.failure
            if entry.before is not None:
                self.remnants.drop(entry.before)
            self.remnants.keep(entry.key, entry.digest, live)
        except Exception as error:
            if not opened.done():
                opened.set_exception(error)
            elif not isinstance(error, StatusError):
                log.failure("unhandled exception", error, error_id=new_error_id())
        finally:
            opened.cancel()

    def _look_if_orphaned(self, entry: Entry) -> None:
        if entry.num_calls or entry.live is None or entry.live.over.is_set():
            return
        if self.is_closed:
            entry.expire()
        else:
            self.retention.keep(entry)

    def end(self, entry: Entry) -> None:
        """A life is over: its id is free."""
        self._entries.release(entry)
        self.retention.release(entry)

    # -- errors that say how to go on ------------------------------------------------------------

    def keep_failed(self, error: StatusError, entry: Entry, digest: bytes) -> StatusError:
        """Keep a request whose error is not its own fault, if it has given output, and say how to go on."""
        live = entry.live
        if error.code not in RESUMED_CODES or error.reason == "SUPERSEDED" or live is None:
            return error
        remnant = self.remnants.keep(entry.key, digest, live) if live.has_output else None
        return error if remnant is None else with_token(error, remnant.token)

    @staticmethod
    def with_token_of(entry: Entry, error: StatusError) -> StatusError:
        """An error that kept a request from being taken up leaves its token good."""
        is_passing = error.retry_after_s is not None
        if entry.before is None or not is_passing or RESUME_TOKEN in error.metadata:
            return error
        return with_token(error, entry.before.token)

    # -- giving up ------------------------------------------------------------

    def give_up_slow(self, since: float, limit_s: float) -> None:
        """End the reading of clients that have not read since a time of the event loop's clock."""
        for reader, live in list(self.readers.items()):
            if reader.given_at is not None and reader.given_at < since:
                live.fail(
                    StatusError(
                        grpc.StatusCode.ABORTED,
                        f"the output was not read for {limit_s:g} s",
                        reason="SLOW_CONSUMER",
                    )
                )
                reader.call_off()

    def end_orphans(self) -> None:
        """Take nothing more up, and end what nobody reads."""
        self.is_closed = True
        self.retention.end_all()

    def cut_short(self) -> None:
        """End every request that still lives with an error, however its client reads."""
        for entry in self._entries:
            if entry.live is not None:
                entry.live.fail(stopping())
        for reader in list(self.readers):
            reader.call_off()

    async def close(self) -> None:
        """End everything that outlived its call. May come twice."""
        self.end_orphans()
        keepers = list(self.keepers)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
