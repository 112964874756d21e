"""When requests come in an open loop: seconds from the start, endless, the same for the same seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator


def arrival_times(kind: str, rate: float, burstiness: float, seed: object) -> Iterator[float]:
    """Times of arrivals, `rate` a second on average.

    `constant` keeps equal gaps. `poisson` draws them from an exponential distribution. `gamma` draws them
    from a gamma distribution of shape `burstiness`, whose coefficient of variation is 1 / sqrt(shape): 1 is
    Poisson, below 1 comes in bursts, above 1 is more even.
    """
    rng = random.Random(f"arrivals {seed}")
    mean = 1.0 / rate
    now, number = 0.0, 0
    while True:
        yield now
        number += 1
        if kind == "constant":
            now = number * mean  # a sum of gaps would drift
        elif kind == "poisson":
            now += rng.expovariate(rate)
        else:
            now += rng.gammavariate(burstiness, mean / burstiness)
