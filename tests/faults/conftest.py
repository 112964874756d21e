"""Real processes under faults: a gateway, mock engines behind proxies, and streams that check every token.

One gateway and two engines serve all tests of a module; each test leaves them well, and nothing of it behind.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tools.chaos.checker import Expected, StreamCheck
from tools.chaos.clients import Clients
from tools.chaos.stack import Engine, Stack, mock_command
from tools.chaos.workload import HTTP, MULTIPLEX, Spec, load_vocabulary, mock_expect, stop_early

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
STEP_MS = 8
# What a machine that others use may add to any time that is promised.
SLACK_S = 2.0


def mock_engine(*flags: object) -> list[str]:
    return mock_command("--step-ms", STEP_MS, "--tokenizer", DEMO, "--drain-seconds", 0.2, *flags)


@pytest.fixture(scope="session")
def vocabulary() -> Any:
    return load_vocabulary(DEMO)


def spec(name: str, length: int = 130, **fields: Any) -> Spec:
    seed = fields.get("seed", 11)
    values: dict[str, Any] = {
        # Another prompt for each seed: an engine that knows a prompt is asked first.
        "prompt_ids": tuple(300 + (131 * seed + 17 * place) % 3000 for place in range(40)),
        "seed": seed,
        "num_samples": 1,
        "max_tokens": length,
        "temperature": 0.8,
    }
    return Spec(name, **(values | fields))


def all_kinds(length: int = 130) -> list[Spec]:
    """One of each: greedy, seeded, several samples, log-probabilities, and every way in."""
    return [
        spec("greedy", length, temperature=0.0),
        spec("seeded", length, seed=12),
        spec("samples", length, num_samples=4, seed=13),
        spec("logprobs", length, logprobs=2, seed=14),
        spec("multiplexed", length, way=MULTIPLEX, seed=15, num_samples=2),
        spec("multiplexed-too", length, way=MULTIPLEX, seed=16, prompt_ids=(7, 8, 9)),
        spec("http", length, way=HTTP, seed=17, num_samples=2),
        spec("stops", length, seed=18),
    ]


class Streams:
    """Streams in flight and the checks of what they got."""

    def __init__(self, clients: Clients, vocabulary: Any) -> None:
        self._clients = clients
        self._vocabulary = vocabulary
        self._expect = mock_expect(vocabulary)
        self._tasks: list[asyncio.Task[None]] = []
        self.checks: dict[str, StreamCheck] = {}

    def expected(self, wanted: Spec) -> list[Expected]:
        return list(self._expect(wanted))

    def start(self, *wanted: Spec) -> None:
        """Start requests. The one called "stops" gets a stop string from late in its own output."""
        for one in wanted:
            expected = self.expected(one)
            if one.name == "stops":
                at = 3 * one.max_tokens // 4
                stop = self._vocabulary.decode(expected[0].token_ids[at : at + 4])[1:8]
                one = spec(one.name, one.max_tokens, seed=one.seed, stop=stop)
                expected = [stop_early(sample, stop, self._vocabulary) for sample in expected]
                assert expected[0].reason == "STOP"
            check = self.checks[one.name] = StreamCheck(one.name, expected, has_tokens=one.way != HTTP)
            self._tasks.append(asyncio.create_task(self._clients.run(one, check)))

    async def have(self, num_tokens: int) -> None:
        """Return once every stream that is told its tokens has so many of each sample."""
        checks = [check for name, check in self.checks.items() if name != "http"]
        async with asyncio.timeout(30):
            while not all(len(s.token_ids) >= num_tokens for check in checks for s in check.samples):
                assert not any(check.error for check in checks), [check.error for check in checks]
                await asyncio.sleep(0.01)

    async def end(self, timeout_s: float = 60.0) -> None:
        """Wait for all of them."""
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*self._tasks)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    @property
    def problems(self) -> list[str]:
        """What was lost, doubled, wrong, or did not end well."""
        return [problem for check in self.checks.values() for problem in check.problems]

    @property
    def worst_gap_s(self) -> float:
        return max(gap for check in self.checks.values() for gap in check.gaps_s)


class Noticed:
    """When the gateway said that a link is down, and why; times are of the wall clock, as in the log."""

    def __init__(self, stack: Stack, engine: Engine) -> None:
        self._stack = stack
        self._target = str(engine.proxy.address)
        self._since = time.time()

    async def find(self, within_s: float = 20.0) -> tuple[float, str]:
        """Seconds from this object's making to the first such event, and its reason."""
        async with asyncio.timeout(within_s):
            while True:
                for event in self._stack.gateway.events():
                    if event.get("event") == "link down" and event.get("target") == self._target:
                        at = datetime.fromisoformat(event["time"]).timestamp()
                        # The log's time is cut to milliseconds.
                        if at >= self._since - 0.002:
                            return at - self._since, json.dumps(event["reason"])
                await asyncio.sleep(0.05)


StartStreams = Callable[..., Streams]
Heal = Callable[[], Awaitable[None]]


async def busiest(stack: Stack) -> Engine:
    """The engine that runs most."""
    running = [(await engine.load()).running for engine in stack.engines]
    assert max(running) > 0
    return stack.engines[running.index(max(running))]


async def make_well(stack: Stack) -> None:
    """Every engine runs, is reachable, and the gateway has a link to it; nothing is left of what ran."""
    for engine in stack.engines:
        engine.proxy.make_well()
        if engine.is_running:
            engine.signal(signal.SIGCONT)
        else:
            await engine.start()
    await stack.wait_until_up(len(stack.engines))
    assert await stack.problems_when_idle() == []
