"""Who may come in: bounds on what waits, refused at once and with a time to come back.

"Waiting" is a request that has not drawn its first token. Knows numbers, not requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from weft.rpc.errors import StatusError

MIN_RETRY_S = 0.1
MAX_RETRY_S = 30.0
# The pace is the mean over about so many first tokens: several come with one step, without a gap between.
_MEMORY = 100


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds of one gateway. Tokens are prompt tokens, times the samples of a request. `retry_after_s` is the
    answer while nothing is known of the pace.
    """

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
            raise admission.refusal("too many prompt tokens are waiting", admission.queue_s())
        self._num_tokens = num_tokens
        admission.waiting_tokens += num_tokens

    def promote(self) -> None:
        """The request has its first token: it no longer waits."""
        if self._is_waiting:
            self._stop_waiting()
            self._admission.note_first_token()

    def leave(self) -> None:
        """The request is over."""
        if self._is_waiting:
            self._stop_waiting()
        if self._is_live:
            self._is_live = False
            self._admission.num_live -= 1

    def _stop_waiting(self) -> None:
        self._is_waiting = False
        self._admission.num_waiting -= 1
        self._admission.waiting_tokens -= self._num_tokens


class Admission:
    """Counts who is in, and how fast first tokens come while others wait. `now` is in seconds."""

    def __init__(
        self, limits: AdmissionLimits | None = None, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits or AdmissionLimits()
        self._now = now
        self._first_token_at: float | None = None
        self._mean_gap_s = 0.0
        self._num_gaps = 0
        self.num_live = 0
        self.num_waiting = 0
        self.waiting_tokens = 0
        self.num_refused = 0

    def enter(self) -> Ticket:
        """Take a place before any work is done for the request. Raises StatusError when there is none."""
        if self.num_live >= self.limits.max_live_requests:
            raise self.refusal("too many requests are running")
        if self.num_waiting >= self.limits.max_waiting_requests:
            raise self.refusal("too many requests are waiting", self.queue_s())
        self.num_live += 1
        self.num_waiting += 1
        return Ticket(self)

    def note_first_token(self) -> None:
        """A request has left the queue. The gap to the next one counts only if somebody waits for it."""
        now = self._now()
        if self._first_token_at is not None:
            self._num_gaps = min(self._num_gaps + 1, _MEMORY)
            self._mean_gap_s += (now - self._first_token_at - self._mean_gap_s) / self._num_gaps
        self._first_token_at = now if self.num_waiting else None

    def queue_s(self) -> float | None:
        """The time in which half of what waits will have its first token, so that who comes back then neither
        finds the queue as it was nor leaves it empty. None while the pace is not known.
        """
        return self.num_waiting * self._mean_gap_s / 2 if self._num_gaps else None

    def refusal(self, message: str, wait_s: float | None = None) -> StatusError:
        """RESOURCE_EXHAUSTED with the time to come back."""
        self.num_refused += 1
        wait_s = self.limits.retry_after_s if wait_s is None else wait_s
        return StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            message,
            retry_after_s=min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S),
            reason="QUEUE_FULL",
        )
