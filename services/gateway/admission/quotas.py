"""What each key may use: requests a second, tokens a minute, streams at once. Knows callers and numbers, not
requests.

The rule of tokens: a request is charged its prompt, once, and for each of its samples the output that it may
draw; when it ends, what it did not draw is given back. It passes when all of that fits, or when the bucket is
full. A request that no engine was given costs no tokens, and one refused for its quota costs nothing at all.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import grpc

from services.gateway.admission.token_bucket import TokenBucket
from weft.rpc.auth import Caller
from weft.rpc.errors import StatusError

# Of an output whose length the client leaves open, so much is charged at the door. The rest of what it draws
# is charged at its end.
ASSUMED_OUTPUT_TOKENS = 256
# Accounts kept of keys that have nothing in flight.
MAX_IDLE_ACCOUNTS = 4096
# Nobody knows when a stream will end.
STREAM_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """Limits of one key; None does not limit."""

    requests_per_second: float | None = None
    tokens_per_minute: float | None = None
    max_streams: int | None = None

    def of(self, caller: Caller) -> QuotaLimits:
        """The caller's own limits, and these where it has none."""
        if caller.requests_per_second is caller.tokens_per_minute is caller.max_streams is None:
            return self
        return QuotaLimits(
            _first(caller.requests_per_second, self.requests_per_second),
            _first(caller.tokens_per_minute, self.tokens_per_minute),
            caller.max_streams if caller.max_streams is not None else self.max_streams,
        )

    def part(self, num_parts: int) -> QuotaLimits:
        """One of `num_parts` equal parts, of streams at least one."""
        if num_parts == 1:
            return self
        return QuotaLimits(
            None if self.requests_per_second is None else self.requests_per_second / num_parts,
            None if self.tokens_per_minute is None else self.tokens_per_minute / num_parts,
            None if self.max_streams is None else max(1, self.max_streams // num_parts),
        )


NO_LIMITS = QuotaLimits()


def _first(own: float | None, usual: float | None) -> float | None:
    return own if own is not None else usual


@dataclass(frozen=True, slots=True)
class QuotaState:
    """One limit as it stands: of `limit` there are `remaining`; it is whole again in `reset_s`."""

    limit: float
    remaining: float
    reset_s: float


class Account:
    """What one key has in use."""

    def __init__(self, limits: QuotaLimits, now: float) -> None:
        self.limits = limits
        self.num_streams = 0
        self.requests = _request_bucket(limits, now)
        self.tokens = _token_bucket(limits, now)

    def check(self, num_tokens: int, now: float) -> None:
        """Raises StatusError when no more request, of at least `num_tokens`, fits. Changes nothing."""
        limits = self.limits
        if limits.max_streams is not None and self.num_streams >= limits.max_streams:
            raise over_quota("max_streams", limits.max_streams, STREAM_RETRY_S)
        if self.requests is not None and (wait_s := self.requests.wait_s(1.0, now)):
            raise over_quota("requests_per_second", limits.requests_per_second, wait_s)
        self.check_tokens(num_tokens, now)

    def check_tokens(self, num_tokens: int, now: float) -> None:
        """Raises StatusError when so many tokens do not fit. Changes nothing."""
        if self.tokens is not None and (wait_s := self.tokens.wait_s(num_tokens, now)):
            raise over_quota("tokens_per_minute", self.limits.tokens_per_minute, wait_s)

    def begin(self, now: float) -> Lease:
        """Count a request in. `check` must have passed at this `now`."""
        self.num_streams += 1
        if self.requests is not None:
            self.requests.take(1.0, now)
        return Lease(self)

    def count_request(self, now: float) -> None:
        """Count one that takes no stream of its own. Raises StatusError when it does not fit."""
        if self.requests is None:
            return
        if wait_s := self.requests.wait_s(1.0, now):
            raise over_quota("requests_per_second", self.limits.requests_per_second, wait_s)
        self.requests.take(1.0, now)

    def is_fresh(self, now: float) -> bool:
        """Whether nothing distinguishes it from a new one."""
        buckets = (self.requests, self.tokens)
        return not self.num_streams and not any(b is not None and b.fill_s(now) for b in buckets)

    def adopt(self, limits: QuotaLimits, now: float) -> None:
        """Go on with other limits: the key file was read again."""
        self.limits = limits
        self.requests = _resized(self.requests, _request_bucket(limits, now), now)
        self.tokens = _resized(self.tokens, _token_bucket(limits, now), now)


class Lease:
    """One request's part of its key's account. `end` may come twice."""

    __slots__ = ("_account", "_charged", "_is_live")

    def __init__(self, account: Account) -> None:
        self._account = account
        self._charged = 0
        self._is_live = True

    def claim_tokens(self, num_tokens: int, now: float) -> None:
        """Charge what the request may use. Raises StatusError when that does not fit; its place among the
        requests of this second is then given back.
        """
        account = self._account
        if account.tokens is None:
            return
        try:
            account.check_tokens(num_tokens, now)
        except StatusError:
            if account.requests is not None:
                account.requests.give(1.0, now)
            raise
        account.tokens.take(num_tokens, now)
        self._charged = num_tokens

    def end(self, num_used: int, now: float) -> None:
        """The request is over and has used so many tokens: settle the difference."""
        if not self._is_live:
            return
        self._is_live = False
        account = self._account
        account.num_streams -= 1
        if account.tokens is not None and self._charged:
            account.tokens.give(self._charged - num_used, now)


class Quotas:
    """The accounts of all keys that have limits; callers without a name share one. Of several processes that
    serve together each has its part: together they let no key use more than it may.
    """

    def __init__(self, defaults: QuotaLimits = NO_LIMITS, *, num_processes: int = 1) -> None:
        self.defaults = defaults
        self._num_processes = num_processes
        self._accounts: OrderedDict[str | None, Account] = OrderedDict()

    def account(self, caller: Caller, now: float) -> Account | None:
        """The caller's account; None when nothing limits it."""
        limits = self.defaults.of(caller).part(self._num_processes)
        account = self._accounts.get(caller.name)
        if account is None:
            if limits == NO_LIMITS:
                return None
            self._forget(now)
            account = self._accounts[caller.name] = Account(limits, now)
            return account
        if account.limits != limits:
            account.adopt(limits, now)
        self._accounts.move_to_end(caller.name)
        return account

    def states(self, caller: Caller, now: float) -> dict[str, QuotaState]:
        """Where the caller stands, by "requests" and "tokens"; what has no limit is left out."""
        account = self.account(caller, now)
        found: dict[str, QuotaState] = {}
        if account is not None:
            for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
                if bucket is not None:
                    remaining = max(0.0, bucket.level(now))
                    found[name] = QuotaState(bucket.capacity, remaining, bucket.fill_s(now))
        return found

    def _forget(self, now: float) -> None:
        """Keep the number of accounts bounded: the longest unused go, those with streams never."""
        if len(self._accounts) < MAX_IDLE_ACCOUNTS:
            return
        idle = [name for name, account in self._accounts.items() if not account.num_streams]
        fresh = [name for name in idle if self._accounts[name].is_fresh(now)]
        for name in fresh or idle[: max(1, len(idle) // 8)]:
            del self._accounts[name]


def charge_at_the_door(num_prompt_tokens: int, max_tokens: int | None, num_samples: int) -> int:
    """The tokens that a request is charged before it has drawn any; `max_tokens` None: the client left it
    open.
    """
    per_sample = ASSUMED_OUTPUT_TOKENS if max_tokens is None else max_tokens
    return num_prompt_tokens + max(1, num_samples) * per_sample


def over_quota(name: str, limit: float | None, wait_s: float) -> StatusError:
    """RESOURCE_EXHAUSTED that names the quota and the time to come back, rounded up to milliseconds."""
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"this key's limit of {name} ({limit:g}) is used up",
        retry_after_s=math.ceil(wait_s * 1000) / 1000,
        reason="QUOTA_EXCEEDED",
        metadata={"quota": name, "limit": f"{limit:g}"},
    )


def _request_bucket(limits: QuotaLimits, now: float) -> TokenBucket | None:
    """Holds one second's requests, and one at least."""
    rate = limits.requests_per_second
    return None if rate is None else TokenBucket(rate, max(1.0, rate), now)


def _token_bucket(limits: QuotaLimits, now: float) -> TokenBucket | None:
    """Holds one minute's tokens."""
    tokens = limits.tokens_per_minute
    return None if tokens is None else TokenBucket(tokens / 60, tokens, now)


def _resized(old: TokenBucket | None, new: TokenBucket | None, now: float) -> TokenBucket | None:
    if old is None or new is None:
        return new
    old.resize(new.rate, new.capacity, now)
    return old
