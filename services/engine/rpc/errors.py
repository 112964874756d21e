"""The one table from what can go wrong in the engine to a gRPC status. Knows no call and no stream."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from services.engine.core.errors import (
    DeadlineUnmet,
    DoesNotFit,
    Draining,
    DuplicateRequest,
    InternalFailure,
    InvalidRequest,
    QueueFull,
    RequestError,
)
from services.engine.loop import EngineUnavailable
from weft import logs
from weft.rpc.errors import StatusError, internal_error, invalid_argument, new_error_id

UNAVAILABLE_RETRY_S = 1.0

log = logs.get_logger("engine.rpc")


def _invalid(error: InvalidRequest) -> StatusError:
    return invalid_argument([(error.field, str(error))])


def _does_not_fit(error: DoesNotFit) -> StatusError:
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error), reason="KV_CACHE_TOO_SMALL")


def _queue_full(error: QueueFull) -> StatusError:
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry_after_s=error.retry_after_s, reason="QUEUE_FULL"
    )


def _duplicate(error: DuplicateRequest) -> StatusError:
    return StatusError(grpc.StatusCode.ALREADY_EXISTS, "the slot is live already", reason="SLOT_LIVE")


def _deadline(error: DeadlineUnmet) -> StatusError:
    return StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, str(error), reason="DEADLINE_UNMET")


def _draining(error: Draining) -> StatusError:
    return StatusError(
        grpc.StatusCode.UNAVAILABLE, str(error), retry_after_s=UNAVAILABLE_RETRY_S, reason="DRAINING"
    )


def _unavailable(error: EngineUnavailable) -> StatusError:
    return engine_failed()


def _internal(error: InternalFailure) -> StatusError:
    # The core has logged the stack already, under the same id.
    return internal_error(error.error_id)


_TABLE: dict[type[RequestError], Callable[..., StatusError]] = {
    InvalidRequest: _invalid,
    DoesNotFit: _does_not_fit,
    QueueFull: _queue_full,
    DuplicateRequest: _duplicate,
    DeadlineUnmet: _deadline,
    Draining: _draining,
    EngineUnavailable: _unavailable,
    InternalFailure: _internal,
}


def status_error(error: RequestError) -> StatusError:
    """The status of a request that ended with `error`. An error that the table does not hold is a bug:
    INTERNAL.
    """
    for kind in type(error).__mro__:
        if kind in _TABLE:
            return _TABLE[kind](error)
    error_id = new_error_id()
    log.failure("error of an unknown kind", error, error_id=error_id)
    return internal_error(error_id)


def engine_failed() -> StatusError:
    """What every live stream ends with when the device or the loop is beyond repair."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE,
        "the engine failed",
        retry_after_s=UNAVAILABLE_RETRY_S,
        reason="ENGINE_FAILED",
    )


def shutting_down() -> StatusError:
    """What a stream ends with that a drain has left over."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE,
        "the engine is shutting down",
        retry_after_s=UNAVAILABLE_RETRY_S,
        reason="DRAINING",
    )
