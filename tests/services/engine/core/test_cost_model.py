"""Step times, learned: what is refused, and what counts as hung, must not rest on a few odd steps."""

from __future__ import annotations

import pytest

from services.engine.core.cost_model import FIRST_STEP_BOUND_S, MIN_BOUND_S, CostModel


def test_nothing_is_estimated_before_the_first_observation():
    costs = CostModel()
    assert (costs.itl_s(), costs.prefill_s(1_000)) == (0.0, 0.0)
    assert costs.step_bound_s(1_000) == FIRST_STEP_BOUND_S


def test_a_slow_first_step_of_a_few_tokens_says_little_about_long_prompts():
    costs = CostModel()
    costs.observe(8, 1, 0.3)  # Mostly what a first step costs whatever its length.
    assert costs.prefill_s(1_000) < 6.0
    costs.observe(512, 1, 0.1)
    assert costs.prefill_s(1_000) < 1.0


def test_long_steps_weigh_more_than_short_ones():
    costs = CostModel()
    costs.observe(1_000, 1, 1.0)
    for _ in range(5):
        costs.observe(4, 1, 0.02)
    assert costs.prefill_s(1_000) == pytest.approx(1.0, rel=0.2)


def test_it_follows_a_machine_that_turns_slower():
    costs = CostModel()
    costs.observe(512, 1, 0.1)
    for _ in range(40):
        costs.observe(512, 1, 0.4)
    assert costs.prefill_s(512) == pytest.approx(0.4, rel=0.05)


def test_the_bound_waits_until_both_kinds_of_step_have_been_seen():
    costs = CostModel()
    costs.observe(1, 1, 0.01)  # A prompt of one token looks like a decode.
    assert costs.step_bound_s(2_048) == FIRST_STEP_BOUND_S
    costs.observe(64, 1, 0.05)
    assert costs.step_bound_s(1) == MIN_BOUND_S
