"""Whether the tool itself kept up: its processor time, and how late its event loop came to what was due."""

from __future__ import annotations

import asyncio
import gc
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

SAMPLE_S = 0.02
_GC_THRESHOLD = 100_000


class Health:
    """Samples the loop while a run goes on."""

    def __init__(self) -> None:
        self.lags: array[float] = array("d")
        self.cpu_s = 0.0
        self.wall_s = 0.0

    async def watch(self) -> None:
        """Sample until cancelled. A sample is by how much a sleep was longer than asked."""
        loop = asyncio.get_running_loop()
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            while True:
                due = loop.time() + SAMPLE_S
                await asyncio.sleep(SAMPLE_S)
                self.lags.append(max(0.0, loop.time() - due))
        finally:
            self.cpu_s = time.process_time() - cpu
            self.wall_s = time.perf_counter() - wall


def settle() -> None:
    """Collect, and have nobody look again at what is left. Takes long: best done before a clock runs."""
    gc.collect()
    gc.freeze()


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep the garbage collector from looking at everything in the middle of a run."""
    thresholds = gc.get_threshold()
    settle()
    gc.set_threshold(_GC_THRESHOLD, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
