"""The circuit breaker and the retry budget, with a clock that the test turns."""

from __future__ import annotations

import random

from services.gateway.links.breaker import BreakerState, CircuitBreaker
from services.gateway.routing.retry_budget import RetryBudget

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


def breaker() -> CircuitBreaker:
    return CircuitBreaker(max_failures=3, min_open_s=1.0, max_open_s=8.0, rng=random.Random(1))


def open_time(breaker: CircuitBreaker, now: float) -> float:
    """How long it stays open from `now`, to a hundredth of a second."""
    steps = 0
    while breaker.state(now + steps / 100) is OPEN:
        steps += 1
    return steps / 100


def test_failures_in_a_row_open_it_and_a_success_in_between_does_not() -> None:
    tested = breaker()
    for now in range(20):
        tested.fail(now)
        if now % 2:
            tested.succeed()
    assert tested.state(20.0) is CLOSED
    assert tested.num_opened == 0
    for _ in range(3):
        assert tested.allows(30.0)
        tested.fail(30.0)
    assert tested.state(30.0) is OPEN
    assert not tested.allows(30.0)
    assert tested.num_opened == 1


def test_one_probe_is_let_through_and_its_success_closes() -> None:
    tested = breaker()
    for _ in range(3):
        tested.fail(0.0)
    assert tested.state(2.0) is HALF_OPEN
    assert tested.allows(2.0)
    tested.begin(2.0)
    assert not tested.allows(2.1)
    tested.succeed()
    assert tested.state(2.2) is CLOSED
    assert tested.allows(2.2)


def test_a_probe_that_is_never_heard_of_gives_way() -> None:
    tested = breaker()
    for _ in range(3):
        tested.fail(0.0)
    tested.begin(2.0)
    assert not tested.allows(9.0)
    assert tested.allows(10.1)


def test_the_open_time_grows_with_jitter_up_to_its_bound() -> None:
    tested = breaker()
    for _ in range(3):
        tested.fail(0.0)
    now, times = 0.0, []
    for _ in range(7):
        times.append(open_time(tested, now))
        now += times[-1] + 0.01
        assert tested.allows(now)
        tested.begin(now)
        tested.fail(now)
    for number, seconds in enumerate(times):
        middle = min(8.0, 2.0**number)
        assert 0.74 * middle <= seconds <= 1.26 * middle
    assert len({round(seconds / min(8.0, 2.0**n), 3) for n, seconds in enumerate(times)}) > 3, "no jitter"
    tested.succeed()
    for _ in range(3):
        tested.fail(now)
    assert open_time(tested, now) < 1.3, "a success makes it begin anew"


def test_an_engine_that_was_merely_away_is_closed_when_it_answers() -> None:
    tested = breaker()
    for _ in range(50):
        tested.fail_to_connect()
    assert tested.state(0.0) is OPEN
    assert tested.num_opened == 1
    tested.connect(1.0)
    assert tested.state(1.0) is CLOSED


def test_an_engine_that_died_at_work_is_probed_when_it_answers() -> None:
    tested = breaker()
    tested.fail(0.0)
    for _ in range(5):
        tested.fail_to_connect()
    tested.connect(1.0)
    assert tested.state(1.0) is HALF_OPEN
    tested.begin(1.0)
    assert not tested.allows(1.0)
    tested.succeed()
    assert tested.allows(1.0)


def test_the_budget_is_a_share_of_starts_and_a_floor() -> None:
    budget = RetryBudget(share=0.5, floor_per_s=2.0, initial=1.0, most=10.0)
    assert budget.has_token(100.0)
    budget.take(100.0)
    assert not budget.has_token(100.0)
    budget.start()
    assert not budget.has_token(100.0)
    budget.start()
    assert budget.has_token(100.0)
    budget.take(100.0)
    assert not budget.has_token(100.4)
    assert budget.has_token(100.6)
    assert budget.tokens(1000.0) == 10.0, "it does not grow without end"
    for _ in range(100):
        budget.start()
    assert budget.tokens(1000.0) == 10.0
