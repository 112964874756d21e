"""The one path of every request, whatever face it came through: admit, resolve, place, let go.

A request's life runs from `begun` to `ended`, and every way out of it passes the one `finally` of `_life`. A
usual life is as long as the call that it came with. That of a resumable request is in a task of its own,
and calls come to it and go. Knows neither gRPC calls nor HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import grpc

from services.gateway.admission.admission import Admission, Ticket
from services.gateway.admission.dispatch import Dispatcher
from services.gateway.admission.quotas import charge_at_the_door
from services.gateway.admission.usage import KeyUsage
from services.gateway.counters import RequestCounters
from services.gateway.permissions import check_model, meant_model
from services.gateway.resolution import check_fields, resolve
from services.gateway.routing.places import find_places
from services.gateway.routing.router import Router
from services.gateway.sessions.sessions import Sessions
from services.gateway.sessions.turn import Turn, end_turn
from services.gateway.streams.attendance import Attendance, stopping
from services.gateway.streams.entries import Entries, Entry
from services.gateway.streams.live import LiveRequest
from services.gateway.streams.orphans import RetentionLimits
from services.gateway.streams.pacing import Pacer
from services.gateway.streams.reader import Reader
from services.gateway.streams.resumption import digest_of
from weft import logs
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.rpc.auth import Caller
from weft.rpc.errors import StatusError
from weft.v1 import gateway_service_pb2 as gateway_pb

SWEEP_S = 1.0
# How long the end of a drain waits for the last errors to be on their way.
LAST_WORDS_S = 1.0
log = logs.get_logger("gateway")


class Gateway:
    """All requests of this process. `max_request_s` bounds those that name no deadline; a client that lets
    its output lie for `slow_client_s` is given up.
    """

    def __init__(
        self,
        router: Router,
        admission: Admission,
        sessions: Sessions,
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
            lambda info: find_places(router.usable(), info),
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
        # Seconds a token after the first, of a request that had more than one.
        self.observe_pace: Callable[[float], None] = lambda seconds: None
        # What a key may do now: a call on which many requests come outlives a change of its key.
        self.renew: Callable[[Caller], Caller] = lambda caller: caller
        self._max_request_s = max_request_s
        self._slow_client_s = slow_client_s
        self.sessions = sessions
        self.entries = Entries()
        self.attendance = Attendance(
            self._life,
            self.entries,
            self.counters,
            retention or RetentionLimits(),
            renew=lambda caller: self.renew(caller),
            pass_by=admission.pass_by,
        )

    @property
    def num_live(self) -> int:
        """Requests in flight."""
        return self.counters.begun - self.counters.ended

    def open(
        self, request: gateway_pb.GenerateRequest, *, caller: Caller, budget_s: float | None
    ) -> AbstractAsyncContextManager[Reader]:
        """Start a request, or take one up, and read it; leaving the block ends it, if it is not resumable.
        Request ids are unique below the caller's name. `budget_s` is the time left until the caller's
        deadline. Raises StatusError.
        """
        return self.attendance.open(request, caller, budget_s)

    @asynccontextmanager
    async def _life(
        self,
        entry: Entry,
        request: gateway_pb.GenerateRequest,
        caller: Caller,
        budget_s: float | None,
    ) -> AsyncIterator[LiveRequest]:
        """One request, from `begun` to `ended`."""
        counters = self.counters
        counters.begun += 1
        begun_at = self.now()
        code = "OK"
        ticket = live = turn = first_at = None
        try:
            if self.is_draining:
                raise stopping()
            caller = self.renew(caller)
            deadline = self._deadline(budget_s)
            ticket = self.admission.enter(caller, _charge_at_the_door(request))
            entry.turn = await self._begin_turn(entry, request, caller)

            def on_first_token(ticket: Ticket = ticket) -> None:
                nonlocal first_at
                ticket.promote()
                first_at = self.now()
                self.observe_first_token(first_at - begun_at)

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
            live.turn = entry.turn
            if entry.is_cancelled:
                live.cancel()
            if live.is_ended:  # an outcome that is read once more
                ticket.promote()
            else:
                turn = self.dispatcher.start(live, caller)
            yield live
        except StatusError as error:
            code = error.code.name
            raise self.attendance.with_token_of(entry, error) from None
        except (asyncio.CancelledError, GeneratorExit, grpc.aio.BaseError):
            code = "CANCELLED"  # of the library's errors it is a write to a client that is gone
            raise
        except Exception:
            code = "INTERNAL"
            raise
        finally:
            if live is not None:
                live.close()
            end_turn(entry.turn, live)
            self.attendance.end(entry)
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
            if live is not None and first_at is not None and entry.before is None:
                self._observe_pace(live, self.now() - first_at)

    def _observe_pace(self, live: LiveRequest, seconds: float) -> None:
        """`seconds` from the first token to the end, over the tokens of the longest sample."""
        num_tokens = max(len(sample.token_ids) for sample in live.samples)
        if num_tokens > 1:
            self.observe_pace(seconds / (num_tokens - 1))

    async def _resolve(
        self,
        entry: Entry,
        request: gateway_pb.GenerateRequest,
        caller: Caller,
        deadline: float,
        on_first_token: Callable[[], None],
    ) -> LiveRequest:
        """A new request, with nothing left open."""
        if entry.turn is not None:
            link = await entry.turn.find(self.router.find_soon, deadline)
        else:
            link = await self.router.find_soon(
                self.model_for(caller, request.model), deadline, key=entry.key[1]
            )
        if link.info is None or link.assets is None:
            raise self.router.unavailable()
        check_model(caller, link.info.model_name, link.info.artifact_version)
        check_fields(request, link.info, self.limits)
        self.entries.claim(entry)
        request_id = entry.key[1]
        resolved = await resolve(
            request, link.info, link.assets, request_id, deadline, self.limits, entry.turn
        )

        def on_failure(error: StatusError) -> StatusError:
            return self.attendance.keep_failed(error, entry, entry.digest or digest_of(request))

        return LiveRequest(
            resolved,
            asyncio.get_running_loop().time,
            on_first_token,
            is_resumable=entry.opened is not None,
            on_failure=on_failure,
            pacer=self.pacer,
        )

    def _revive(
        self, entry: Entry, caller: Caller, deadline: float, on_first_token: Callable[[], None]
    ) -> LiveRequest:
        """A request that had ended, once more."""
        before = entry.before
        if before is None:
            raise ValueError("there is nothing to go on with")
        old = before.live
        check_model(caller, old.resolved.info.model_name, old.resolved.info.artifact_version)
        self.entries.claim(entry)
        self.counters.resumes["revived"] += 1
        # A resumable request keeps the deadline of its first call; the life of another is its call's.
        resolved = old.resolved if old.is_resumable else replace(old.resolved, deadline=deadline)
        return LiveRequest(
            resolved,
            asyncio.get_running_loop().time,
            on_first_token,
            is_resumable=old.is_resumable,
            on_failure=lambda error: self.attendance.keep_failed(error, entry, before.digest),
            before=old,
            pacer=self.pacer,
        )

    async def _begin_turn(
        self, entry: Entry, request: gateway_pb.GenerateRequest, caller: Caller
    ) -> Turn | None:
        """The session's turn that a request is, if it is one. Raises StatusError."""
        if entry.before is not None:
            old = entry.before.live
            if old.turn is None or old.is_ended:
                return old.turn
            return await self.sessions.begin_again(old.turn)
        return await self.sessions.begin(request, caller.name) if request.session_id else None

    def model_for(self, caller: Caller, model: str) -> str:
        """The model that a request of this key names, or means without naming it. Raises StatusError."""
        infos = [link.info for link in self.router.links if link.info is not None]
        return meant_model(caller, model, {(info.model_name, info.artifact_version) for info in infos})

    def cancel(self, owner: str | None, request_id: str) -> None:
        """End a live request of the same key. Raises StatusError when there is none."""
        self.entries.cancel((owner, request_id))

    async def sweep(self) -> None:
        """Give up clients that do not read. Runs until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.attendance.retention.hold_to_bounds()
            self.attendance.give_up_slow(self.now() - self._slow_client_s, self._slow_client_s)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more and end what nobody reads; wait until what runs has ended, at most `timeout_s`.
        What is left then ends with an error.
        """
        self.is_draining = True
        self.attendance.end_orphans()
        if await self._wait_for_quiet(timeout_s):
            return
        log.warning("requests cut short by the end of the drain", requests=self.num_live)
        self.attendance.cut_short()
        await self._wait_for_quiet(LAST_WORDS_S)

    async def _wait_for_quiet(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while self.num_live or self.attendance.readers:  # a poll at the end of a life
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(0.05)
        return True

    async def close(self) -> None:
        """End everything that outlived its call. May come twice."""
        await self.attendance.close()

    @staticmethod
    def now() -> float:
        """The event loop's clock, in seconds."""
        return asyncio.get_running_loop().time()

    def _deadline(self, budget_s: float | None) -> float:
        if budget_s is not None and budget_s <= 0:
            raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
        return self.now() + min(self._max_request_s if budget_s is None else budget_s, self._max_request_s)


def _charge_at_the_door(request: gateway_pb.GenerateRequest, num_prompt_tokens: int | None = None) -> int:
    """The tokens that a request is charged; while its prompt is not tokenized, those that are known."""
    sampling = request.sampling
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else None
    if num_prompt_tokens is None:
        num_prompt_tokens = max(1, len(request.token_ids.ids))
        max_tokens = max_tokens or 0
    return charge_at_the_door(num_prompt_tokens, max_tokens, sampling.n)
