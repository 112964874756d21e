"""The one path of every request, whatever face it came through: admit, resolve, place, hand out, let go.

Every way out of a request passes the one `finally` of `Gateway.open`. Knows neither gRPC calls nor HTTP.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar

import grpc

from services.gateway.admission import Admission, Ticket
from services.gateway.live import LiveRequest
from services.gateway.permissions import check_model, meant_model
from services.gateway.resolution import check_fields, resolve
from services.gateway.router import Router
from weft import logs
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.rpc.auth import Caller
from weft.rpc.errors import StatusError
from weft.v1 import gateway_service_pb2 as gateway_pb

SWEEP_S = 1.0
log = logs.get_logger("gateway")


class RequestCounters:
    """Requests begun and ended, and how. Equal when nothing is in flight."""

    # Every instance that is alive, for a test that checks the balance of all of them.
    instances: ClassVar[weakref.WeakSet[RequestCounters]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.by_code: Counter[str] = Counter()
        RequestCounters.instances.add(self)


@dataclass(slots=True)
class _Entry:
    """A live id. `live` is None while the request is being resolved; a cancel may come before that."""

    live: LiveRequest | None = None
    is_cancelled: bool = False


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
    ) -> None:
        self.router = router
        self.limits = limits
        self.admission = admission
        self.counters = RequestCounters()
        self.is_draining = False
        # Seconds since the request's arrival, for whoever measures.
        self.observe_first_token: Callable[[float], None] = lambda seconds: None
        self.observe_request: Callable[[float], None] = lambda seconds: None
        # What a key may do now: a call on which many requests come outlives a change of its key.
        self.renew: Callable[[Caller], Caller] = lambda caller: caller
        self._max_request_s = max_request_s
        self._slow_client_s = slow_client_s
        self._entries: dict[tuple[str | None, str], _Entry] = {}

    @property
    def num_live(self) -> int:
        """Requests in flight."""
        return self.counters.begun - self.counters.ended

    @asynccontextmanager
    async def open(
        self, request: gateway_pb.GenerateRequest, *, caller: Caller, budget_s: float | None
    ) -> AsyncIterator[LiveRequest]:
        """Admit and start a request; leaving the block ends it. Request ids are unique below the
        caller's name. `budget_s` is the time left until the caller's deadline. Raises
        StatusError.
        """
        counters = self.counters
        counters.begun += 1
        begun_at = self.now()
        code = "OK"
        ticket = live = None
        key: tuple[str | None, str] | None = None
        try:
            if self.is_draining:
                raise StatusError(
                    grpc.StatusCode.UNAVAILABLE,
                    "the gateway is stopping",
                    retry_after_s=1.0,
                    reason="DRAINING",
                )
            caller = self.renew(caller)
            deadline = self._deadline(budget_s)
            ticket = self.admission.enter()
            link = await self.router.find_soon(self.model_for(caller, request.model), deadline)
            if link.info is None or link.assets is None:
                raise self.router.unavailable()
            check_model(caller, link.info.model_name, link.info.artifact_version)
            check_fields(request, link.info, self.limits)
            request_id = request.request_id or uuid.uuid4().hex
            entry = self._claim(caller.name, request_id)
            key = (caller.name, request_id)
            resolved = await resolve(request, link.info, link.assets, request_id, deadline, self.limits)
            ticket.claim_tokens(len(resolved.prompt_token_ids) * resolved.num_samples)

            def on_first_token(ticket: Ticket = ticket) -> None:
                ticket.promote()
                self.observe_first_token(self.now() - begun_at)

            entry.live = live = LiveRequest(resolved, self.now, on_first_token)
            self._start(entry, live)
            yield live
        except StatusError as error:
            code = error.code.name
            raise
        except (asyncio.CancelledError, GeneratorExit, grpc.aio.BaseError):
            code = "CANCELLED"  # of the library's errors it is a write to a client that is gone
            raise
        except Exception:
            code = "INTERNAL"
            raise
        finally:
            if live is not None:
                live.close()
            if key is not None:
                del self._entries[key]
            if ticket is not None:
                ticket.leave()
            counters.ended += 1
            counters.by_code[code] += 1
            self.observe_request(self.now() - begun_at)

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
            limit = self.now() - self._slow_client_s
            for entry in list(self._entries.values()):
                live = entry.live
                if live is not None and any(
                    s.paused_at is not None and s.paused_at < limit for s in live.samples
                ):
                    live.fail(
                        StatusError(
                            grpc.StatusCode.ABORTED,
                            f"the output was not read for {self._slow_client_s:g} s",
                            reason="SLOW_CONSUMER",
                        )
                    )

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more; wait until what runs has ended, at most `timeout_s`."""
        self.is_draining = True
        until = time.monotonic() + timeout_s
        while self.num_live and time.monotonic() < until:  # noqa: ASYNC110 - a poll at the end of a life
            await asyncio.sleep(0.05)
        if self.num_live:
            log.warning("requests cut short by the end of the drain", requests=self.num_live)

    @staticmethod
    def now() -> float:
        """The event loop's clock, in seconds."""
        return asyncio.get_running_loop().time()

    def _deadline(self, budget_s: float | None) -> float:
        if budget_s is not None and budget_s <= 0:
            raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
        return self.now() + min(self._max_request_s if budget_s is None else budget_s, self._max_request_s)

    def _claim(self, owner: str | None, request_id: str) -> _Entry:
        if (owner, request_id) in self._entries:
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS, "a live request has this id", reason="REQUEST_ID_IN_USE"
            )
        entry = self._entries[owner, request_id] = _Entry()
        return entry

    def _start(self, entry: _Entry, live: LiveRequest) -> None:
        if entry.is_cancelled:
            live.cancel()
            return
        for sample in live.samples:
            if not self.router.place(sample):
                raise self.router.unavailable()
