"""Who may come in: quotas of keys and bounds on what waits, refused at once and with a time to come back.

"Waiting" is a request that has not drawn its first token. Knows callers and numbers, not requests.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from services.gateway.admission.quotas import Lease, Quotas
from weft.rpc.auth import ANYBODY, Caller
from weft.rpc.errors import StatusError

QUEUE_FULL = "QUEUE_FULL"
QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
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

    __slots__ = ("_admission", "_is_live", "_is_waiting", "_lease", "_num_tokens")

    def __init__(self, admission: Admission, lease: Lease | None) -> None:
        self._admission = admission
        self._lease = lease
        self._is_live = True
        self._is_waiting = True
        self._num_tokens = 0

    def claim_tokens(self, num_tokens: int, num_charged: int = 0) -> None:
        """Say how large the request is: so many prompt tokens wait, so many tokens are charged to its key.
        Raises StatusError when that is more than may wait, or than the key has left.
        """
        admission = self._admission
        if (
            admission.num_waiting > 1
            and admission.waiting_tokens + num_tokens > admission.limits.max_waiting_tokens
        ):
            raise admission.refusal("too many prompt tokens are waiting", admission.queue_s())
        if self._lease is not None:
            with admission.counting_refusals():
                self._lease.claim_tokens(num_charged, admission.now())
        self._num_tokens = num_tokens
        admission.waiting_tokens += num_tokens

    def promote(self) -> None:
        """The request has its first token: it no longer waits."""
        if self._is_waiting:
            self._stop_waiting()
            self._admission.note_first_token()

    def leave(self, num_used: int = 0) -> None:
        """The request is over, and has used so many tokens of its key's."""
        if self._is_waiting:
            self._stop_waiting()
        if self._is_live:
            self._is_live = False
            self._admission.num_live -= 1
            if self._lease is not None:
                self._lease.end(num_used, self._admission.now())

    def _stop_waiting(self) -> None:
        self._is_waiting = False
        self._admission.num_waiting -= 1
        self._admission.waiting_tokens -= self._num_tokens


class Admission:
    """Counts who is in, and how fast first tokens come while others wait. `now` is in seconds."""

    def __init__(
        self,
        limits: AdmissionLimits | None = None,
        quotas: Quotas | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or AdmissionLimits()
        self.quotas = quotas or Quotas()
        self.now = now
        # Refusals by reason.
        self.refused: Counter[str] = Counter({QUEUE_FULL: 0, QUOTA_EXCEEDED: 0})
        self._first_token_at: float | None = None
        self._mean_gap_s = 0.0
        self._num_gaps = 0
        self.num_live = 0
        self.num_waiting = 0
        self.waiting_tokens = 0

    @property
    def num_refused(self) -> int:
        """Refusals since the start."""
        return self.refused.total()

    @contextlib.contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count a StatusError that passes through."""
        try:
            yield
        except StatusError as error:
            self.refused[error.reason or ""] += 1
            raise

    def enter(self, caller: Caller = ANYBODY, num_known: int = 1) -> Ticket:
        """Take a place before any work is done for the request, which will be charged `num_known` tokens at
        least. Raises StatusError when there is none. The key is asked first: who is over its quota would not
        come in if the queue were empty.
        """
        now = self.now()
        account = self.quotas.account(caller, now)
        if account is not None:
            with self.counting_refusals():
                account.check(num_known, now)
        if self.num_live >= self.limits.max_live_requests:
            raise self.refusal("too many requests are running")
        if self.num_waiting >= self.limits.max_waiting_requests:
            raise self.refusal("too many requests are waiting", self.queue_s())
        self.num_live += 1
        self.num_waiting += 1
        return Ticket(self, None if account is None else account.begin(now))

    def pass_by(self, caller: Caller) -> None:
        """A call that comes to a request which is in already: of its key's quotas it uses a request of this
        second. Raises StatusError.
        """
        now = self.now()
        account = self.quotas.account(caller, now)
        if account is not None:
            with self.counting_refusals():
                account.count_request(now)

    def note_first_token(self) -> None:
        """A request has left the queue. The gap to the next one counts only if somebody waits for it."""
        now = self.now()
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
        self.refused[QUEUE_FULL] += 1
        wait_s = self.limits.retry_after_s if wait_s is None else wait_s
        return StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            message,
            retry_after_s=min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S),
            reason=QUEUE_FULL,
        )
