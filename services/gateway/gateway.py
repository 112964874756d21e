"""The one path of every request, whatever face it came through: admit, resolve, place, let go.

A request's life runs from `begun` to `ended`, and every way out of it passes the one `finally` of `_life`. A
usual life is as long as the call that it came with. That of a resumable request is in a task of its own,
and calls come to it and go. Knows neither gRPC calls nor HTTP.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import grpc

from services.gateway.admission import Admission, Ticket
from services.gateway.dispatch import Dispatcher
from services.gateway.live import LiveRequest
from services.gateway.orphans import Retention, RetentionLimits
from services.gateway.pacing import Pacer
from services.gateway.permissions import check_model, meant_model
from services.gateway.places import num_places
from services.gateway.quotas import charge_at_the_door
from services.gateway.reader import Reader
from services.gateway.resolution import check_fields, resolve
from services.gateway.resumption import (
    RESUMED_CODES,
    Key,
    Remnant,
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
from services.gateway.router import Router
from services.gateway.usage import KeyUsage
from weft import logs
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.rpc.auth import Caller
from weft.rpc.errors import RESUME_TOKEN, StatusError, new_error_id
from weft.v1 import gateway_service_pb2 as gateway_pb

SWEEP_S = 1.0
# How long the end of a drain waits for the last errors to be on their way.
LAST_WORDS_S = 1.0
log = logs.get_logger("gateway")


class RequestCounters:
    """Requests begun and ended, and how. Equal when nothing is in flight."""

    # Every instance that is alive, for a test that checks the balance of all of them.
    instances: ClassVar[weakref.WeakSet[RequestCounters]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.by_code: Counter[str] = Counter()
        # Calls that took a request up, by how: "attached" to a live one, "revived" one that had ended.
        self.resumes: Counter[str] = Counter()
        RequestCounters.instances.add(self)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count a request that is refused before its life begins."""
        try:
            yield
        except StatusError as error:
            self.begun += 1
            self.ended += 1
            self.by_code[error.code.name] += 1
            raise


@dataclass(eq=False, slots=True)
class _Entry:
    """A live id. `live` is None while the request is being resolved; a cancel may come before that.

    `opened` gives the request of a resumable one, whose `digest` is its body's. `before` is what it goes on
    with. While no call is at a resumable request, this is what is kept of it.
    """

    key: Key
    before: Remnant | None = None
    digest: bytes = b""
    opened: asyncio.Future[LiveRequest] | None = None
    live: LiveRequest | None = None
    is_cancelled: bool = False

    @property
    def num_bytes(self) -> int:
        """About how much memory the request takes."""
        return self.live.num_bytes if self.live is not None else 0

    def expire(self) -> None:
        """Nobody came back in time: what still runs is cancelled."""
        if self.live is not None:
            self.live.close()


class Gateway:
    """All requests of this process. `max_request_s` bounds those that name no deadline; a client that lets
    its output lie for `slow_client_s` is given up.
    """

    def __init__(
        self,
        router: Router,
        admission: Admission,
        *,
        max_request_s: float = 1800.0,
        slow_client_s: float = 60.0,
        limits: RequestLimits = DEFAULT_LIMITS,
        retention: RetentionLimits | None = None,
        ageing_s: float = 10.0,
        max_coalesce_s: float = 0.02,
    ) -> None:
        self.router = router
        self.limits = limits
        self.admission = admission
        self.dispatcher = Dispatcher(
            lambda info: num_places(router.usable(), info),
            router.place,
            wait_s=router.wait_s,
            ageing_s=ageing_s,
        )
        router.room_listeners.append(self.dispatcher.pump)
        self.pacer = Pacer(max_coalesce_s)
        self.usage = KeyUsage()
        self.counters = RequestCounters()
        self.is_draining = False
        # Seconds since the request's arrival, for whoever measures.
        self.observe_first_token: Callable[[float], None] = lambda seconds: None
        self.observe_request: Callable[[float], None] = lambda seconds: None
        # What a key may do now: a call on which many requests come outlives a change of its key.
        self.renew: Callable[[Caller], Caller] = lambda caller: caller
        self._max_request_s = max_request_s
        self._slow_client_s = slow_client_s
        self._entries: dict[Key, _Entry] = {}
        self._readers: dict[Reader, LiveRequest] = {}
        self._keepers: set[asyncio.Task[None]] = set()
        # Orphans, which still run, and what is left of requests that have ended.
        self.retention = Retention(retention or RetentionLimits())
        self.remnants = Remnants(self.retention)

    @property
    def num_live(self) -> int:
        """Requests in flight."""
        return self.counters.begun - self.counters.ended

    @asynccontextmanager
    async def open(
        self, request: gateway_pb.GenerateRequest, *, caller: Caller, budget_s: float | None
    ) -> AsyncIterator[Reader]:
        """Start a request, or take one up, and read it; leaving the block ends it, if it is not resumable.
        Request ids are unique below the caller's name. `budget_s` is the time left until the caller's
        deadline. Raises StatusError.
        """
        if not is_about_resuming(request):
            entry = _Entry((caller.name, request.request_id or uuid.uuid4().hex))
            async with self._life(entry, request, caller, budget_s) as live:
                async with self._reading(entry, live) as reader:
                    yield reader
            return
        with self.counters.refusals():
            if self.is_draining:
                raise _draining()
            check_resume_fields(request)
            entry, is_live, where = self._find(request, caller)
        if entry.opened is None:  # by its token, one that is not resumable
            async with self._life(entry, request, caller, budget_s) as live:
                async with self._reading(entry, live, where) as reader:
                    yield reader
            return
        if not is_live:
            self._begin_keeping(entry, request, caller, budget_s)
        live = await asyncio.shield(entry.opened)
        if is_live:
            info = live.resolved.info
            check_model(self.renew(caller), info.model_name, info.artifact_version)
            self.counters.resumes["attached"] += 1
        where = where or places(request, live)
        async with self._reading(entry, live, where) as reader:
            yield reader

    @asynccontextmanager
    async def _life(
        self,
        entry: _Entry,
        request: gateway_pb.GenerateRequest,
        caller: Caller,
        budget_s: float | None,
    ) -> AsyncIterator[LiveRequest]:
        """One request, from `begun` to `ended`."""
        counters = self.counters
        counters.begun += 1
        begun_at = self.now()
        code = "OK"
        ticket = live = turn = None
        try:
            if self.is_draining:
                raise _draining()
            caller = self.renew(caller)
            deadline = self._deadline(budget_s)
            ticket = self.admission.enter(caller, _charge_at_the_door(request))

            def on_first_token(ticket: Ticket = ticket) -> None:
                ticket.promote()
                self.observe_first_token(self.now() - begun_at)

            if entry.before is not None:
                live = self._revive(entry, caller, deadline, on_first_token)
            else:
                live = await self._resolve(entry, request, caller, deadline, on_first_token)
            resolved = live.resolved
            num_prompt_tokens = len(resolved.prompt_token_ids)
            ticket.claim_tokens(
                num_prompt_tokens * resolved.num_samples, _charge_at_the_door(request, num_prompt_tokens)
            )
            entry.live = live
            if entry.is_cancelled:
                live.cancel()
            turn = self.dispatcher.start(live, caller)
            yield live
        except StatusError as error:
            code = error.code.name
            raise self._with_token(error, entry) from None
        except (asyncio.CancelledError, GeneratorExit, grpc.aio.BaseError):
            code = "CANCELLED"  # of the library's errors it is a write to a client that is gone
            raise
        except Exception:
            code = "INTERNAL"
            raise
        finally:
            if live is not None:
                live.close()
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]
            self.retention.release(entry)
            used = (0, 0)
            if turn is not None:
                turn.leave()
                used = turn.used
                self.usage.add(caller.name, *used)
            if ticket is not None:
                ticket.leave(sum(used))
            counters.ended += 1
            counters.by_code[code] += 1
            self.observe_request(self.now() - begun_at)

    async def _resolve(
        self,
        entry: _Entry,
        request: gateway_pb.GenerateRequest,
        caller: Caller,
        deadline: float,
        on_first_token: Callable[[], None],
    ) -> LiveRequest:
        """A new request, with nothing left open."""
        link = await self.router.find_soon(
            self.model_for(caller, request.model), deadline, key=request.session_id or entry.key[1]
        )
        if link.info is None or link.assets is None:
            raise self.router.unavailable()
        check_model(caller, link.info.model_name, link.info.artifact_version)
        check_fields(request, link.info, self.limits)
        self._claim(entry)
        request_id = entry.key[1]
        resolved = await resolve(request, link.info, link.assets, request_id, deadline, self.limits)

        def on_failure(error: StatusError) -> StatusError:
            return self._keep_failed(error, entry, entry.digest or digest_of(request))

        return LiveRequest(
            resolved,
            self.now,
            on_first_token,
            is_resumable=entry.opened is not None,
            on_failure=on_failure,
            pacer=self.pacer,
        )

    def _revive(
        self, entry: _Entry, caller: Caller, deadline: float, on_first_token: Callable[[], None]
    ) -> LiveRequest:
        """A request that had ended, once more."""
        before = entry.before
        if before is None:
            raise ValueError("there is nothing to go on with")
        old = before.live
        check_model(caller, old.resolved.info.model_name, old.resolved.info.artifact_version)
        self._claim(entry)
        self.counters.resumes["revived"] += 1
        # A resumable request keeps the deadline of its first call; the life of another is its call's.
        resolved = old.resolved if old.is_resumable else replace(old.resolved, deadline=deadline)
        return LiveRequest(
            resolved,
            self.now,
            on_first_token,
            is_resumable=old.is_resumable,
            on_failure=lambda error: self._keep_failed(error, entry, before.digest),
            before=old,
            pacer=self.pacer,
        )

    # -- reading, leaving, coming back ------------------------------------------------------------

    @asynccontextmanager
    async def _reading(
        self, entry: _Entry, live: LiveRequest, where: Sequence[tuple[int, int]] | None = None
    ) -> AsyncIterator[Reader]:
        """One call at a request. A write that hangs is called off when the reading must end."""
        self.retention.release(entry)
        reader = live.attach(where)
        self._readers[reader] = live
        try:
            async with asyncio.timeout(None) as reader.patience:
                yield reader
        except TimeoutError:
            if reader.patience is None or not reader.patience.expired() or reader.failure is None:
                raise
            raise reader.failure from None
        finally:
            del self._readers[reader]
            if live.leave(reader) and entry.opened is not None and not live.over.is_set():
                if self.is_draining:
                    entry.expire()
                else:
                    self.retention.keep(entry)

    def _find(
        self, request: gateway_pb.GenerateRequest, caller: Caller
    ) -> tuple[_Entry, bool, list[tuple[int, int]] | None]:
        """The entry of a request that is to be resumable or is taken up, whether it is live already, and
        where its token says to go on. Raises StatusError.
        """
        remnant: Remnant | None
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
        if entry is not None and entry.opened is not None and entry.digest == digest:
            return entry, True, where
        if entry is not None:
            if not request.resume_token or entry.before is not remnant or entry.live is None:
                raise body_differs()
            entry.live.supersede()  # the same token once more: the call before it is given up
            del self._entries[key]
        if remnant is not None and remnant.digest != digest:
            raise body_differs()
        if remnant is None and not (request.resumable and offsets_are_zero(request)):
            raise not_kept("request_id")
        if remnant is not None and not request.resume_token:
            places(request, remnant.live)
        opened = asyncio.get_running_loop().create_future() if is_resumable else None
        entry = _Entry(key, remnant, digest, opened)
        self._claim(entry)
        return entry, False, where

    def _begin_keeping(
        self,
        entry: _Entry,
        request: gateway_pb.GenerateRequest,
        caller: Caller,
        budget_s: float | None,
    ) -> None:
        """Let a resumable request live in a task of its own."""
        keeper = asyncio.create_task(self._keep_living(entry, request, caller, budget_s))
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)

    async def _keep_living(
        self,
        entry: _Entry,
        request: gateway_pb.GenerateRequest,
        caller: Caller,
        budget_s: float | None,
    ) -> None:
        opened = entry.opened
        if opened is None:
            raise ValueError("the request is not resumable")
        # Nobody need be there to hear why it could not begin.
        opened.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with self._life(entry, request, caller, budget_s) as live:
                self.retention.keep(entry)
                opened.set_result(live)
                await live.over.wait()
                if live.failure is not None:
                    raise live.failure
                if not live.is_ended:
                    raise StatusError(grpc.StatusCode.CANCELLED, "nobody came back for the request")
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

    def _keep_failed(self, error: StatusError, entry: _Entry, digest: bytes) -> StatusError:
        """Keep a request whose error is not its own fault, if it has given output, and say how to go on."""
        live = entry.live
        if error.code not in RESUMED_CODES or error.reason == "SUPERSEDED" or live is None:
            return error
        if not live.has_output:
            return error
        return with_token(error, self.remnants.keep(entry.key, digest, live).token)

    @staticmethod
    def _with_token(error: StatusError, entry: _Entry) -> StatusError:
        """An error that kept a request from being taken up leaves its token good."""
        is_passing = error.retry_after_s is not None
        if entry.before is None or not is_passing or RESUME_TOKEN in error.metadata:
            return error
        return with_token(error, entry.before.token)

    def model_for(self, caller: Caller, model: str) -> str:
        """The model that a request of this key names, or means without naming it. Raises StatusError."""
        infos = [link.info for link in self.router.links if link.info is not None]
        return meant_model(caller, model, {(info.model_name, info.artifact_version) for info in infos})

    def cancel(self, owner: str | None, request_id: str) -> None:
        """End a live request of the same key. Raises StatusError when there is none."""
        entry = self._entries.get((owner, request_id))
        if entry is None:
            raise StatusError(grpc.StatusCode.NOT_FOUND, "no live request has this id")
        entry.is_cancelled = True
        if entry.live is not None:
            entry.live.cancel()

    async def sweep(self) -> None:
        """Give up clients that do not read. Runs until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.retention.hold_to_bounds()
            limit = self.now() - self._slow_client_s
            for reader, live in list(self._readers.items()):
                if reader.given_at is not None and reader.given_at < limit:
                    live.fail(
                        StatusError(
                            grpc.StatusCode.ABORTED,
                            f"the output was not read for {self._slow_client_s:g} s",
                            reason="SLOW_CONSUMER",
                        )
                    )
                    reader.call_off()

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more and end what nobody reads; wait until what runs has ended, at most `timeout_s`.
        What is left then ends with an error.
        """
        self.is_draining = True
        self.retention.end_all()
        if await self._wait_for_quiet(timeout_s):
            return
        log.warning("requests cut short by the end of the drain", requests=self.num_live)
        for entry in list(self._entries.values()):
            if entry.live is not None:
                entry.live.fail(_draining())
        for reader in list(self._readers):
            reader.call_off()
        await self._wait_for_quiet(LAST_WORDS_S)

    async def _wait_for_quiet(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while self.num_live or self._readers:  # a poll at the end of a life
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(0.05)
        return True

    async def close(self) -> None:
        """End everything that outlived its call. May come twice."""
        self.retention.end_all()
        for keeper in list(self._keepers):
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    @staticmethod
    def now() -> float:
        """The event loop's clock, in seconds."""
        return asyncio.get_running_loop().time()

    def _deadline(self, budget_s: float | None) -> float:
        if budget_s is not None and budget_s <= 0:
            raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
        return self.now() + min(self._max_request_s if budget_s is None else budget_s, self._max_request_s)

    def _claim(self, entry: _Entry) -> None:
        """Make the entry the one of its id. Raises StatusError when another one is."""
        if self._entries.setdefault(entry.key, entry) is not entry:
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS, "a live request has this id", reason="REQUEST_ID_IN_USE"
            )


def _draining() -> StatusError:
    return StatusError(
        grpc.StatusCode.UNAVAILABLE, "the gateway is stopping", retry_after_s=1.0, reason="DRAINING"
    )


def _charge_at_the_door(request: gateway_pb.GenerateRequest, num_prompt_tokens: int | None = None) -> int:
    """The tokens that a request is charged; while its prompt is not tokenized, those that are known."""
    sampling = request.sampling
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else None
    if num_prompt_tokens is None:
        num_prompt_tokens = max(1, len(request.token_ids.ids))
        max_tokens = max_tokens or 0
    return charge_at_the_door(num_prompt_tokens, max_tokens, sampling.n)
