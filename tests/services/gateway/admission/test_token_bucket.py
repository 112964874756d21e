"""The bucket: what it lets pass in any span of time, and that the wait it tells is the true one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission.token_bucket import TokenBucket

AMOUNTS = st.floats(0.1, 50.0)
STEPS = st.lists(st.tuples(st.floats(0.0, 5.0), AMOUNTS), min_size=1, max_size=60)


@given(STEPS, st.floats(0.1, 20.0), st.floats(1.0, 30.0))
def test_no_span_of_time_lets_more_pass_than_capacity_and_rate(
    steps: list[tuple[float, float]], rate: float, capacity: float
) -> None:
    bucket = TokenBucket(rate, capacity, 0.0)
    now = 0.0
    passed: list[tuple[float, float]] = []
    for pause, amount in steps:
        now += pause
        if amount <= capacity and not bucket.wait_s(amount, now):
            bucket.take(amount, now)
            passed.append((now, amount))
    for begin in range(len(passed)):
        total = 0.0
        for at, amount in passed[begin:]:
            total += amount
            assert total <= capacity + rate * (at - passed[begin][0]) + 1e-6


@given(STEPS, st.floats(0.1, 20.0), st.floats(1.0, 30.0))
def test_the_wait_told_is_enough_and_not_a_moment_too_long(
    steps: list[tuple[float, float]], rate: float, capacity: float
) -> None:
    bucket = TokenBucket(rate, capacity, 0.0)
    now = 0.0
    for pause, amount in steps:
        now += pause
        wait_s = bucket.wait_s(amount, now)
        if wait_s > 1e-3:
            assert bucket.wait_s(amount, now + 0.99 * wait_s) > 0
            now += wait_s
            assert bucket.wait_s(amount, now) == pytest.approx(0.0, abs=1e-6)
        bucket.take(amount, now)


def test_what_is_larger_than_the_bucket_passes_when_it_is_full_and_is_paid_afterwards() -> None:
    bucket = TokenBucket(rate=10, capacity=100, now=0.0)
    assert bucket.wait_s(1000, 0.0) == 0
    bucket.take(1000, 0.0)
    assert bucket.level(0.0) == -900
    assert bucket.wait_s(1, 0.0) == pytest.approx(90.1)
    bucket.give(950, 0.0)
    assert bucket.level(0.0) == 50
    bucket.give(1e9, 0.0)
    assert bucket.level(0.0) == 100


def test_a_resize_keeps_what_is_in_use() -> None:
    bucket = TokenBucket(rate=1, capacity=10, now=0.0)
    bucket.take(4, 0.0)
    bucket.resize(2, 20, 0.0)
    assert bucket.level(0.0) == 16
    bucket.resize(1, 3, 0.0)
    assert bucket.level(0.0) == -1


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(rate=1000, capacity=10, now=5.0)
    bucket.take(10, 5.0)
    assert bucket.level(5.0) == bucket.level(1.0) == 0
    assert bucket.level(5.001) == pytest.approx(1.0)
