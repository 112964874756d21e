"""What can go wrong with one request, as types.

Knows no transport: `services.engine.rpc.errors` maps these to status codes.
"""

from __future__ import annotations

from secrets import token_hex


class RequestError(Exception):
    """A request that ends with an error. The message is safe to show to the client."""


class InvalidRequest(RequestError):
    """A field is bad. `field` names it the way the client wrote it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class DoesNotFit(RequestError):
    """The request is valid but larger than this deployment's whole KV cache."""


class QueueFull(RequestError):
    """The waiting queue is at its limit. `retry_after_s` is an estimate of when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DuplicateRequest(RequestError):
    """A live sequence already has this key."""


class DeadlineUnmet(RequestError):
    """The deadline passed, or cannot be met, before the first token."""


class Draining(RequestError):
    """The engine is shutting down and admits nothing new."""


class InternalFailure(RequestError):
    """A bug or a numeric failure in one request. `cause` goes to the log alone, under the `error_id`
    that the client is shown.
    """

    def __init__(self, stage: str, cause: BaseException) -> None:
        super().__init__(f"internal error in {stage}")
        self.stage = stage
        self.cause = cause
        self.error_id = token_hex(8)


class DeviceFault(Exception):
    """The device or the step loop is beyond repair: every live request ends and the process exits."""


class IntegrityError(Exception):
    """The block accounting does not add up. Always a bug."""
