"""What the gateway measures of itself and of its streams."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from services.gateway.loop_lag import watch_lag
from tests.services.gateway.conftest import FakeEngine, RunningGateway
from weft.v1 import gateway_service_pb2 as gateway_pb
from weft.v1 import generation_pb2 as pb


def value(gateway: RunningGateway, name: str) -> float:
    text = gateway.application.metrics.text().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return float(values[name])


async def drawn(gateway: RunningGateway, **fields: Any) -> None:
    sampling = pb.SamplingParams(max_tokens=fields.pop("max_tokens"), ignore_eos=True, seed=3)
    async for _ in gateway.stub.Generate(
        gateway_pb.GenerateRequest(text="Once", sampling=sampling, **fields)
    ):
        pass


async def test_the_pace_is_the_time_after_the_first_token_by_tokens(
    gateway: RunningGateway, engine: FakeEngine
) -> None:
    engine.step_s = 0.02
    name = "weft_gateway_time_per_output_token_seconds"
    began = time.monotonic()
    await drawn(gateway, max_tokens=11)
    took = time.monotonic() - began
    assert value(gateway, f"{name}_count") == 1
    assert 0.015 < value(gateway, f"{name}_sum") <= took / 10
    await drawn(gateway, max_tokens=1)
    assert value(gateway, f"{name}_count") == 1, "one token has no pace"


async def test_the_loop_says_how_late_it_was(gateway: RunningGateway, settle: Any) -> None:
    name = "weft_gateway_loop_lag_seconds"
    await settle(lambda: value(gateway, f"{name}_count") >= 1)
    before = value(gateway, f"{name}_sum")
    time.sleep(0.6)  # noqa: ASYNC251 - nothing else may run meanwhile
    await settle(lambda: value(gateway, f"{name}_sum") >= before + 0.3)


async def test_a_loop_with_nothing_to_do_is_not_late() -> None:
    seen: list[float] = []
    task = asyncio.create_task(watch_lag(seen.append, period_s=0.01))
    await asyncio.sleep(0.3)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert len(seen) >= 3
    assert all(lag >= 0 for lag in seen)
    assert sorted(seen)[len(seen) // 2] < 0.2


async def test_what_was_coalesced_is_told(gateway: RunningGateway) -> None:
    gateway.application.gateway.pacer.num_held = 7
    assert value(gateway, "weft_gateway_coalesced_total") == 7


async def test_the_process_is_told(gateway: RunningGateway) -> None:
    assert value(gateway, "process_resident_memory_bytes") > 1e6
