"""An engine dies, freezes, hangs, drains or is cut off: the streams go on, token for token."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.faults.conftest import (
    DEMO,
    SLACK_S,
    Noticed,
    Streams,
    all_kinds,
    busiest,
    make_well,
    mock_engine,
    spec,
)
from tools.chaos.clients import Clients
from tools.chaos.stack import Stack

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: Any) -> AsyncIterator[Stack]:
    """Two engines with few blocks, so that one alone has to preempt, and a gateway."""
    engine = mock_engine("--num-blocks", 96, "--hang-seconds", 60)
    flags = ["--tokenizer", DEMO]
    async with Stack([engine] * 2, tmp_path_factory.mktemp("logs"), gateway_flags=flags) as stack:
        yield stack
        assert await stack.stop() == []


@pytest_asyncio.fixture(loop_scope="module")
async def stack(shared: Stack) -> AsyncIterator[Stack]:
    yield shared
    await make_well(shared)


@pytest_asyncio.fixture(loop_scope="module")
async def streams(stack: Stack, vocabulary: Any) -> AsyncIterator[Streams]:
    async with Clients(stack.target, stack.http) as clients:
        streams = Streams(clients, vocabulary)
        yield streams
        streams.close()


async def test_without_a_fault_every_token_is_the_oracles(stack: Stack, streams: Streams) -> None:
    before = await stack.metric("weft_gateway_replays_total")
    streams.start(*all_kinds(60))
    await streams.end()
    assert streams.problems == []
    assert await stack.metric("weft_gateway_replays_total") == before


async def test_kill_9_is_noticed_within_a_second(stack: Stack, streams: Streams) -> None:
    before = await stack.metric("weft_gateway_replays_total")
    streams.start(*all_kinds())
    await streams.have(10)
    victim = await busiest(stack)
    noticed = Noticed(stack, victim)
    await victim.kill()
    await streams.end()
    assert streams.problems == []
    assert (await noticed.find())[0] < 1.0 + SLACK_S
    assert await stack.metric("weft_gateway_replays_total") > before


async def test_a_frozen_engine_is_noticed_within_a_second_and_says_nothing_twice(
    stack: Stack, streams: Streams
) -> None:
    streams.start(*all_kinds())
    await streams.have(10)
    victim = await busiest(stack)
    noticed = Noticed(stack, victim)
    victim.signal(signal.SIGSTOP)
    after_s, reason = await noticed.find()
    assert "dead" in reason
    assert after_s < 1.0 + 0.3 + SLACK_S
    # What it still had to say comes now, from an epoch that is over.
    victim.signal(signal.SIGCONT)
    await streams.end()
    assert streams.problems == []
    assert streams.worst_gap_s > 0.5, "the fault has hit nobody"


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param({"up": True, "down": True}, id="both-ways"),
        pytest.param({"up": False, "down": True}, id="one-way", marks=pytest.mark.slow),
    ],
)
async def test_a_black_hole_is_noticed_within_a_second(
    stack: Stack, streams: Streams, ways: dict[str, bool]
) -> None:
    streams.start(*all_kinds())
    await streams.have(10)
    victim = await busiest(stack)
    noticed = Noticed(stack, victim)
    victim.proxy.black_hole(**ways)
    after_s, reason = await noticed.find()
    assert "dead" in reason
    assert after_s < 1.0 + 0.3 + SLACK_S
    victim.proxy.heal()
    await streams.end()
    assert streams.problems == []


async def test_a_device_that_fails_ends_nobodys_stream(stack: Stack, streams: Streams) -> None:
    streams.start(*all_kinds())
    await streams.have(10)
    victim = await busiest(stack)
    noticed = Noticed(stack, victim)
    victim.signal(signal.SIGRTMIN)
    assert await victim.wait_ended(20.0) == 70
    await streams.end()
    assert streams.problems == []
    assert "failed" in (await noticed.find())[1]


async def test_a_hung_step_is_noticed_after_its_bound(stack: Stack, streams: Streams) -> None:
    streams.start(*all_kinds())
    await streams.have(10)
    victim = await busiest(stack)
    noticed = Noticed(stack, victim)
    victim.signal(signal.SIGUSR2)
    after_s, reason = await noticed.find()
    assert "hung" in reason
    # No step's bound is below 2 s; a heartbeat comes every 200 ms.
    assert after_s < 2.0 + 1.0 + 0.3 + SLACK_S
    # Its step still hangs, and it answers as before: it is given nothing that would hang with it.
    await streams.end()
    for seed in range(6):
        streams.start(spec(f"after-{seed}", 20, seed=seed))
        await asyncio.sleep(0.2)
    await streams.end()
    assert streams.problems == []
    down = [event for event in stack.gateway.events() if event.get("event") == "link down"]
    assert sum("hung" in event["reason"] for event in down) == 1
    victim.signal(signal.SIGUSR2)


async def test_a_drained_engine_ends_nobodys_stream(stack: Stack, streams: Streams) -> None:
    streams.start(*all_kinds(180))
    await streams.have(10)
    victim = await busiest(stack)
    await victim.drain(0.5)
    await streams.end()
    assert streams.problems == []
    await victim.kill()  # a drained engine takes nothing more: another is started


async def test_sigterm_ends_an_engine_and_nobodys_stream(stack: Stack, streams: Streams) -> None:
    streams.start(*all_kinds(180))
    await streams.have(10)
    victim = await busiest(stack)
    victim.signal(signal.SIGTERM)
    assert await victim.wait_ended() == 0
    await streams.end()
    assert streams.problems == []


async def test_a_reset_at_any_byte_loses_nothing(stack: Stack, streams: Streams) -> None:
    """The link breaks again and again, in the middle of a frame."""
    for cut in (977, 2003, 4001):
        stack.engines[0].proxy.cut_after_bytes = cut
        stack.engines[0].proxy.reset()
        await asyncio.sleep(0.2)
        streams.start(spec(f"cut-{cut}", 150, num_samples=3, seed=cut), spec(f"too-{cut}", 120, seed=cut + 1))
        await streams.have(5)
        await asyncio.sleep(0.3)
    stack.engines[0].proxy.make_well()
    await streams.end()
    assert streams.problems == []


async def test_single_bytes_and_delay_change_nothing(stack: Stack, streams: Streams) -> None:
    for engine in stack.engines:
        engine.proxy.slice_bytes, engine.proxy.delay_s = 1, 0.05
    streams.start(*all_kinds(40))
    await streams.end()
    assert streams.problems == []


@pytest.mark.slow
async def test_every_engine_freezes_and_comes_back(stack: Stack, streams: Streams) -> None:
    streams.start(*all_kinds())
    await streams.have(10)
    for engine in stack.engines:
        engine.signal(signal.SIGSTOP)
    await asyncio.sleep(2.0)
    for engine in stack.engines:
        engine.signal(signal.SIGCONT)
    await streams.end()
    assert streams.problems == []


async def test_the_last_engine_dies_and_another_is_started(stack: Stack, streams: Streams) -> None:
    streams.start(*all_kinds())
    await streams.have(10)
    for engine in stack.engines:
        await engine.kill()
    await asyncio.sleep(0.5)
    await stack.engines[1].start()
    await streams.end()
    assert streams.problems == []
