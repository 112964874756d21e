"""What is done to the engines, and when: a random schedule from a seed.

At least one engine is well at any time. Knows engines and proxies; knows no stream.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tools.chaos.stack import Engine

KILL, STOP, PARTITION, RESET = "kill", "stop", "partition", "reset"
HANG, DRAIN, TERMINATE, SLICE, FAULT = "hang", "drain", "terminate", "slices", "fault"
WEIGHTS = {KILL: 4, STOP: 3, PARTITION: 3, RESET: 2, HANG: 1, DRAIN: 1, TERMINATE: 2, SLICE: 1, FAULT: 2}
# No step counts as hung before two seconds and its grace of one.
MIN_HANG_S = 2.5
# A real engine cannot be asked for these.
ONLY_MOCK = (HANG, FAULT)
OF_REAL_ENGINES = {kind: weight for kind, weight in WEIGHTS.items() if kind not in ONLY_MOCK}


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. `between`: the mean pause between two faults; `away`: how long a freeze, a partition or a dead
    process lasts, at least and at most; `settle`: an engine is left alone for so long after it is back.
    """

    between: float = 1.2
    away: tuple[float, float] = (1.5, 4.0)
    settle: float = 0.5
    drain: float = 1.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the trace."""

    at_s: float
    kind: str
    engine: str
    lasted_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.at_s:7.2f} s  {self.kind:10s} {self.engine}  for {self.lasted_s:.2f} s"


@dataclass
class Schedule:
    """`run` hurts engines until it is told to stop, and heals them all before it returns."""

    engines: Sequence[Engine]
    seed: int
    weights: dict[str, int] = field(default_factory=lambda: dict(WEIGHTS))
    times: Times = Times()
    trace: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._hurt: set[str] = set()
        self._began = time.monotonic()
        # Each kind once, in any order; then by weight.
        self._first = self._random.sample(list(self.weights), len(self.weights))
        self._actions: dict[str, Callable[[Engine, float], Awaitable[None]]] = {
            KILL: self._kill,
            STOP: self._stop,
            PARTITION: self._partition,
            RESET: self._reset,
            HANG: self._hang,
            DRAIN: self._drain,
            TERMINATE: self._terminate,
            SLICE: self._slice,
            FAULT: self._fault,
        }

    @property
    def counts(self) -> Counter[str]:
        """How often each fault came."""
        return Counter(fault.kind for fault in self.trace)

    async def run(self, seconds: float) -> None:
        """Hurt engines for so long. Raises ServiceError when one does not come back."""
        self._began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while (left := self._began + seconds - time.monotonic()) > 0:
                pause_s = min(left, self._random.expovariate(1 / self.times.between))
                await asyncio.sleep(pause_s)
                away_s = self._random.uniform(*self.times.away)
                order = self._random.sample(list(self.engines), len(self.engines))
                well = [engine for engine in order if engine.name not in self._hurt]
                if len(well) > 1 and time.monotonic() < self._began + seconds:
                    self._hurt.add(well[0].name)
                    group.create_task(self._one(self._next_kind(), well[0], away_s))

    def _next_kind(self) -> str:
        if self._first:
            return self._first.pop()
        return self._random.choices(list(self.weights), list(self.weights.values()))[0]

    async def _one(self, kind: str, engine: Engine, away_s: float) -> None:
        began = time.monotonic()
        await self._actions[kind](engine, away_s)
        now = time.monotonic()
        self.trace.append(Fault(began - self._began, kind, engine.name, now - began))
        await asyncio.sleep(self.times.settle)
        self._hurt.discard(engine.name)

    async def _kill(self, engine: Engine, away_s: float) -> None:
        await engine.kill()
        await asyncio.sleep(away_s / 4)
        await engine.start()

    async def _stop(self, engine: Engine, away_s: float) -> None:
        engine.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(away_s)
        finally:
            engine.signal(signal.SIGCONT)

    async def _partition(self, engine: Engine, away_s: float) -> None:
        engine.proxy.black_hole()
        try:
            await asyncio.sleep(away_s)
        finally:
            engine.proxy.heal()

    async def _reset(self, engine: Engine, away_s: float) -> None:
        engine.proxy.reset()

    async def _hang(self, engine: Engine, away_s: float) -> None:
        engine.signal(signal.SIGUSR2)
        await asyncio.sleep(MIN_HANG_S + away_s)
        engine.signal(signal.SIGUSR2)

    async def _drain(self, engine: Engine, away_s: float) -> None:
        """A drained engine takes nothing more until it is started again."""
        await engine.drain(self.times.drain)
        await engine.kill()
        await engine.start()

    async def _terminate(self, engine: Engine, away_s: float) -> None:
        engine.signal(signal.SIGTERM)
        await engine.wait_ended()
        await engine.start()

    async def _fault(self, engine: Engine, away_s: float) -> None:
        """Its device fails at the next step, and the process ends by itself."""
        engine.signal(signal.SIGRTMIN)
        try:
            await engine.wait_ended(away_s)
        except TimeoutError:  # nothing ran there
            await engine.kill()
        await engine.start()

    async def _slice(self, engine: Engine, away_s: float) -> None:
        engine.proxy.slice_bytes = 1
        try:
            await asyncio.sleep(away_s)
        finally:
            engine.proxy.slice_bytes = None
