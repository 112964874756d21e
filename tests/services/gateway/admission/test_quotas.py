"""Accounts of keys: what is charged when, what is given back, and what a refusal says."""

from __future__ import annotations

import grpc
import pytest

from services.gateway.admission.quotas import MAX_IDLE_ACCOUNTS, Account, QuotaLimits, Quotas
from weft.rpc.auth import ANYBODY, Caller
from weft.rpc.errors import StatusError


def account_of(caller: Caller, quotas: Quotas | None = None) -> Account:
    account = (quotas or Quotas()).account(caller, 0.0)
    assert account is not None
    return account


def refusal(account: Account, now: float, tokens: int = 1) -> StatusError:
    with pytest.raises(StatusError) as caught:
        account.check(tokens, now)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.reason == "QUOTA_EXCEEDED"
    return caught.value


def test_requests_a_second() -> None:
    account = account_of(Caller("a", requests_per_second=4))
    for _ in range(4):
        account.check(1, 0.0)
        account.begin(0.0)
    error = refusal(account, 0.0)
    assert error.metadata == {"quota": "requests_per_second", "limit": "4"}
    assert error.retry_after_s == 0.25
    refusal(account, 0.24)
    account.check(1, 0.25)


def test_the_time_told_is_when_it_passes() -> None:
    account = account_of(Caller("a", requests_per_second=0.3))
    account.begin(0.0)
    wait_s = refusal(account, 0.1).retry_after_s
    assert wait_s == 3.234
    refusal(account, 0.1 + wait_s - 0.002)
    account.check(1, 0.1 + wait_s)


def test_streams_at_once() -> None:
    account = account_of(Caller("a", max_streams=2))
    leases = [account.begin(0.0), account.begin(0.0)]
    error = refusal(account, 0.0)
    assert error.metadata["quota"] == "max_streams"
    assert error.retry_after_s
    leases[0].end(0, 0.0)
    leases[0].end(0, 0.0)
    assert account.num_streams == 1
    account.check(1, 0.0)


def test_tokens_are_charged_at_the_door_and_corrected_at_the_end() -> None:
    account = account_of(Caller("a", tokens_per_minute=600))
    assert account.tokens is not None
    lease = account.begin(0.0)
    lease.claim_tokens(500, 0.0)
    assert account.tokens.level(0.0) == 100
    error = refusal(account, 0.0, tokens=150)
    assert error.metadata["quota"] == "tokens_per_minute"
    assert error.retry_after_s == 5.0
    account.check(100, 0.0)
    lease.end(420, 0.0)
    lease.end(0, 0.0)
    assert account.tokens.level(0.0) == 180


def test_more_than_was_estimated_becomes_a_debt() -> None:
    account = account_of(Caller("a", tokens_per_minute=600))
    lease = account.begin(0.0)
    lease.claim_tokens(300, 0.0)
    lease.end(900, 0.0)
    assert refusal(account, 0.0).retry_after_s == 30.1


def test_who_is_refused_for_tokens_gets_its_request_back() -> None:
    account = account_of(Caller("a", tokens_per_minute=600, requests_per_second=1))
    assert account.tokens is not None
    account.tokens.take(600, 0.0)
    lease = account.begin(0.0)
    with pytest.raises(StatusError):
        lease.claim_tokens(100, 0.0)
    lease.end(0, 0.0)
    assert account.requests is not None
    assert account.requests.level(0.0) == 1
    assert account.tokens.level(0.0) == 0


def test_a_caller_without_limits_has_no_account_and_defaults_fill_in() -> None:
    assert Quotas().account(ANYBODY, 0.0) is None
    assert Quotas().account(Caller("a"), 0.0) is None
    quotas = Quotas(QuotaLimits(max_streams=3, requests_per_second=5))
    assert account_of(Caller("a", requests_per_second=9), quotas).limits == QuotaLimits(9, None, 3)


def test_callers_without_a_name_share_one_account() -> None:
    quotas = Quotas(QuotaLimits(max_streams=1))
    account_of(ANYBODY, quotas).begin(0.0)
    refusal(account_of(Caller(), quotas), 0.0)
    account_of(Caller("a"), quotas).check(1, 0.0)


def test_new_limits_of_a_key_hold_from_the_next_request_on() -> None:
    quotas = Quotas()
    account_of(Caller("a", requests_per_second=1), quotas).begin(0.0)
    refusal(account_of(Caller("a", requests_per_second=1), quotas), 0.0)
    account_of(Caller("a", requests_per_second=10), quotas).check(1, 0.0)
    account_of(Caller("a"), quotas).check(1, 0.0)


def test_memory_is_bounded_and_accounts_in_use_stay() -> None:
    quotas = Quotas(QuotaLimits(requests_per_second=1, max_streams=1))
    busy = account_of(Caller("busy"), quotas)
    busy.begin(0.0)
    for number in range(3 * MAX_IDLE_ACCOUNTS):
        account = account_of(Caller(f"k{number}"), quotas)
        account.begin(0.0).end(0, 0.0)
    assert len(quotas._accounts) <= MAX_IDLE_ACCOUNTS
    assert account_of(Caller("busy"), quotas) is busy


def test_of_several_processes_each_has_a_part() -> None:
    quotas = Quotas(QuotaLimits(tokens_per_minute=600), num_processes=4)
    caller = Caller("a", requests_per_second=8, max_streams=2)
    assert account_of(caller, quotas).limits == QuotaLimits(2, 150, 1)


def test_where_a_caller_stands() -> None:
    quotas = Quotas()
    caller = Caller("a", requests_per_second=2, tokens_per_minute=60)
    account_of(caller, quotas).begin(0.0).claim_tokens(30, 0.0)
    states = quotas.states(caller, 0.0)
    assert (states["requests"].limit, states["requests"].remaining) == (2, 1)
    assert (states["tokens"].remaining, states["tokens"].reset_s) == (30, 30.0)
    assert quotas.states(Caller("b"), 0.0) == {}
