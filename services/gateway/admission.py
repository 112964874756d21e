"""Who may come in: bounds on what waits, refused at once and with a time to come back.

"Waiting" is a request that has not drawn its first token. Knows numbers, not requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from weft.rpc.errors import StatusError


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds of one gateway. Tokens are prompt tokens, times the samples of a request."""

    max_live_requests: int = 4096
    max_waiting_requests: int = 512
    max_waiting_tokens: int = 4 << 20
    retry_after_s: float = 1.0


class Ticket:
    """One request's place. `promote` when its first token is out, `leave` at its end; both may come twice."""

    __slots__ = ("_admission", "_is_live", "_is_waiting", "_num_tokens")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_live = True
        self._is_waiting = True
        self._num_tokens = 0

    def claim_tokens(self, num_tokens: int) -> None:
        """Say how large the request is. Raises StatusError when that is more than may wait."""
        admission = self._admission
        if (
            admission.num_waiting > 1
            and admission.waiting_tokens + num_tokens > admission.limits.max_waiting_tokens
        ):
            raise admission.refusal("too many prompt tokens are waiting")
        self._num_tokens = num_tokens
        admission.waiting_tokens += num_tokens

    def promote(self) -> None:
        """The request no longer waits."""
        if self._is_waiting:
            self._is_waiting = False
            self._admission.num_waiting -= 1
            self._admission.waiting_tokens -= self._num_tokens

    def leave(self) -> None:
        """The request is over."""
        self.promote()
        if self._is_live:
            self._is_live = False
            self._admission.num_live -= 1


class Admission:
    """Counts who is in."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()
        self.num_live = 0
        self.num_waiting = 0
        self.waiting_tokens = 0
        self.num_refused = 0

    def enter(self) -> Ticket:
        """Take a place before any work is done for the request. Raises StatusError when there is none."""
        if self.num_live >= self.limits.max_live_requests:
            raise self.refusal("too many requests are running")
        if self.num_waiting >= self.limits.max_waiting_requests:
            raise self.refusal("too many requests are waiting")
        self.num_live += 1
        self.num_waiting += 1
        return Ticket(self)

    def refusal(self, message: str) -> StatusError:
        """RESOURCE_EXHAUSTED with the time to come back."""
        self.num_refused += 1
        return StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            message,
            retry_after_s=self.limits.retry_after_s,
            reason="QUEUE_FULL",
        )
