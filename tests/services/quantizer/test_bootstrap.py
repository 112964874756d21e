"""Intervals of means: against a formula, and the same each time."""

import numpy as np
import pytest

from services.quantizer.bootstrap import MIN_WINDOWS, Bootstrap


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    low, high = Bootstrap(400).interval([values], lambda total: total / 400)
    error = 1.96 * values.std() / 400**0.5
    assert low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_a_ratio_is_drawn_from_one_text():
    """Numerator and denominator vary together: the ratio of windows that all have one ratio is certain."""
    values = np.random.default_rng(2).uniform(1, 9, 50)
    low, high = Bootstrap(50).interval([values, 3 * values], lambda a, b: b / a)
    assert low == pytest.approx(3) == high


def test_it_is_the_same_each_time():
    values = np.random.default_rng(3).uniform(size=64)
    first, second = (Bootstrap(64).interval([values], lambda total: total) for _ in range(2))
    assert first == second


def test_many_windows_are_drawn_in_packs():
    values = np.random.default_rng(4).normal(0.0, 1.0, 100_000)
    low, high = Bootstrap(100_000).interval([values], lambda total: total / 100_000)
    assert high - low == pytest.approx(2 * 1.96 / 100_000**0.5, rel=0.2)


def test_few_windows_have_none():
    assert Bootstrap(MIN_WINDOWS - 1).interval([np.ones(MIN_WINDOWS - 1)], lambda total: total) is None
    assert Bootstrap(MIN_WINDOWS).interval([np.ones(MIN_WINDOWS)], lambda total: total) is not None
