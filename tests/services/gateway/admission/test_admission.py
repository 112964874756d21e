"""Admission counts: never more in than allowed, and back to zero whatever the order of ends."""

from __future__ import annotations

import contextlib
import random
import time

import grpc
import pytest

from services.gateway.admission.admission import Admission, AdmissionLimits
from weft.rpc.errors import StatusError


def test_counts_return_to_zero() -> None:
    chance = random.Random(1)
    admission = Admission(
        AdmissionLimits(max_live_requests=50, max_waiting_requests=20, max_waiting_tokens=500)
    )
    tickets = []
    for _ in range(5000):
        with contextlib.suppress(StatusError):
            ticket = admission.enter()
            tickets.append(ticket)
            ticket.claim_tokens(chance.randrange(100))
        assert admission.num_live <= 50
        assert admission.num_waiting <= 20
        assert admission.waiting_tokens <= 500
        if tickets and chance.random() < 0.9:
            ticket = tickets.pop(chance.randrange(len(tickets)))
            for _ in range(chance.randrange(3)):
                ticket.promote()
            ticket.leave()
            ticket.leave()
    for ticket in tickets:
        ticket.leave()
    assert (admission.num_live, admission.num_waiting, admission.waiting_tokens) == (0, 0, 0)
    assert admission.num_refused > 0


def test_one_request_may_be_larger_than_the_queue_when_it_is_alone() -> None:
    admission = Admission(AdmissionLimits(max_waiting_tokens=10))
    admission.enter().claim_tokens(1000)
    with pytest.raises(StatusError, match="tokens") as caught:
        admission.enter().claim_tokens(1)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s


def test_a_refusal_takes_microseconds() -> None:
    admission = Admission(AdmissionLimits(max_waiting_requests=1))
    admission.enter()
    begin = time.perf_counter()
    for _ in range(1000):
        with pytest.raises(StatusError):
            admission.enter()
    assert time.perf_counter() - begin < 1.0


def test_a_refusal_tells_half_the_time_of_the_queue() -> None:
    clock = 0.0
    admission = Admission(AdmissionLimits(max_waiting_requests=100), now=lambda: clock)

    def told() -> float | None:
        with pytest.raises(StatusError) as caught:
            admission.enter()
        return caught.value.retry_after_s

    waiting = [admission.enter() for _ in range(100)]
    assert told() == 1.0, "nothing is known of the pace"
    for _ in range(60):
        clock += 0.25
        waiting.pop(0).promote()
        waiting.append(admission.enter())
    assert told() == pytest.approx(100 * 0.25 / 2)
    for number in range(1600):
        clock += 0.16 if number % 16 == 0 else 0  # sixteen with one step
        waiting.pop(0).promote()
        waiting.append(admission.enter())
    assert told() == pytest.approx(0.5, rel=0.1)
    for ticket in waiting:
        clock += 0.01
        ticket.promote()
    clock += 3600  # an hour without a request says nothing of the pace
    waiting = [admission.enter() for _ in range(100)]
    waiting.pop().promote()
    waiting.append(admission.enter())
    assert told() == pytest.approx(0.5, rel=0.1)
    for _ in range(200):
        clock += 100
        waiting.pop(0).promote()
        waiting.append(admission.enter())
    assert told() == 30.0


def test_who_gives_up_while_waiting_says_nothing_of_the_pace() -> None:
    clock = 0.0
    admission = Admission(AdmissionLimits(), now=lambda: clock)
    tickets = [admission.enter() for _ in range(10)]
    tickets.pop().promote()
    for ticket in tickets:
        clock += 1
        ticket.leave()
    assert admission.queue_s() is None
