"""Arrival processes against their distributions, and their repetition."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest

from cli.bench.arrivals import arrival_times


def gaps(
    kind: str, rate: float, burstiness: float = 1.0, seed: object = 1, count: int = 20_000
) -> list[float]:
    times = list(itertools.islice(arrival_times(kind, rate, burstiness, seed), count + 1))
    assert times[0] == 0.0
    return [b - a for a, b in itertools.pairwise(times)]


def test_constant_arrivals_do_not_drift() -> None:
    times = list(itertools.islice(arrival_times("constant", 3.0, 1.0, 1), 30_001))
    assert times[30_000] == pytest.approx(10_000.0, abs=1e-6)
    assert max(gaps("constant", 3.0)) == pytest.approx(min(gaps("constant", 3.0)), abs=1e-9)


def test_poisson_gaps_are_exponential() -> None:
    found = sorted(gaps("poisson", 5.0))
    assert statistics.mean(found) == pytest.approx(0.2, rel=0.03)
    # Kolmogorov and Smirnov: the largest distance to the distribution, 1 % level.
    n = len(found)
    distance = max(
        max(abs((i + 1) / n - (1 - math.exp(-5.0 * x))), abs(i / n - (1 - math.exp(-5.0 * x))))
        for i, x in enumerate(found)
    )
    assert distance < 1.63 / math.sqrt(n)


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_shape_that_was_asked_for(shape: float) -> None:
    found = gaps("gamma", 10.0, shape)
    mean = statistics.mean(found)
    assert mean == pytest.approx(0.1, rel=0.05)
    assert statistics.pstdev(found) / mean == pytest.approx(1 / math.sqrt(shape), rel=0.05)


@pytest.mark.parametrize("kind", ["poisson", "gamma"])
def test_a_seed_repeats_and_another_differs(kind: str) -> None:
    assert gaps(kind, 2.0, 0.5, "a", 50) == gaps(kind, 2.0, 0.5, "a", 50)
    assert gaps(kind, 2.0, 0.5, "a", 50) != gaps(kind, 2.0, 0.5, "b", 50)
