"""Keeps the link to one engine up: session after session, with a pause between them that grows while none
comes about. Knows why a session ends, not what it is made of.
"""

from __future__ import annotations

import asyncio
import random
from typing import Protocol

import grpc

from services.gateway.links.breaker import CircuitBreaker
from services.gateway.links.multiplexer import LinkCounters, ProtocolViolation
from services.gateway.links.terms import EngineRefused, LinkLeft, LinkLost, LinkTimes
from weft import logs
from weft.rpc.errors import new_error_id

# A session that ends earlier is no reason to come back at once.
STABLE_S = 1.0
log = logs.get_logger("gateway.link")


class Connected(Protocol):
    """A link, as far as this module needs it."""

    target: str
    counters: LinkCounters
    breaker: CircuitBreaker
    is_leaving: bool
    last_problem: str

    async def session(self) -> None:
        """One session, from connect to loss; ends with an exception that says why."""


async def keep_up(link: Connected, times: LinkTimes) -> None:
    """Run sessions until cancelled, or until one ends after the link was given up."""
    loop = asyncio.get_running_loop()
    backoff_s = times.min_backoff_s
    while True:
        num_sessions, begun_at = link.counters.sessions, loop.time()
        is_refused = await _run_session(link)
        if link.is_leaving:
            return
        if link.counters.sessions == num_sessions:
            link.breaker.fail_to_connect()
        elif loop.time() - begun_at > STABLE_S:
            backoff_s = times.min_backoff_s
        if is_refused:
            backoff_s = times.refused_backoff_s
        # Many gateways that lost the same engine should not come back in the same moment.
        await asyncio.sleep(backoff_s * random.uniform(0.75, 1.25))
        backoff_s = min(2 * backoff_s, times.max_backoff_s)


async def _run_session(link: Connected) -> bool:
    """One session, and a note of its end. Says whether another try would soon find the same."""
    try:
        await link.session()
    except LinkLeft:
        _note(link, "left")
    except EngineRefused as error:
        _note(link, f"refused: {error}")
        return True
    except (LinkLost, ProtocolViolation) as error:
        _note(link, str(error))
    except grpc.aio.AioRpcError as error:
        _note(link, f"{error.code().name}: {error.details()}")
    except Exception as error:  # whatever an engine or its files do, the next try may find another
        _note(link, f"internal error: {type(error).__name__}", error)
        return True
    return False


def _note(link: Connected, problem: str, error: Exception | None = None) -> None:
    if problem != link.last_problem:
        log.warning("link down", target=link.target, reason=problem)
        if error is not None:
            log.failure("unhandled exception", error, target=link.target, error_id=new_error_id())
    link.last_problem = problem
