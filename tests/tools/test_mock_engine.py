"""The mock engine against its oracle: alone, crowded, preempted, resumed, in a process, and when wrong."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.engine.core.admission import CoreLimits
from services.engine.core.block_manager import BlockManager
from services.engine.core.engine_core import EngineCore
from services.engine.core.scheduler import Scheduler, SchedulerConfig
from services.engine.core.sequence import SamplingParams, Sequence
from tools.mock_engine import MockConfig, MockEngine, oracle
from tools.mock_engine.runner import HashRunner, UnwrittenSlots
from weft.config import ConfigError
from weft.v1 import engine_service_pb2 as pb
from weft.v1 import generation_pb2
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

ROOT = Path(__file__).resolve().parents[2]


def prompt_of(rng: random.Random, pool: list[list[int]]) -> list[int]:
    """A prompt that often shares its head with an earlier one."""
    head = rng.choice(pool) if pool and rng.random() < 0.5 else []
    prompt = head[: rng.randint(0, len(head))] + [rng.randrange(6, 4096) for _ in range(rng.randint(1, 60))]
    pool.append(prompt)
    return prompt


def request(prompt: list[int], seed: int, max_tokens: int, **fields: Any) -> pb.GenerateTokensRequest:
    extra = fields.pop("sampling", {})
    sampling = generation_pb2.SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **extra)
    return pb.GenerateTokensRequest(prompt_token_ids=prompt, sampling=sampling, **fields)


@asynccontextmanager
async def stub_of(address: Any) -> Any:
    # A connection of its own: a pooled one would still be waiting after an engine's death.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(str(address), options=options) as channel:
        yield EngineServiceStub(channel)


async def generate(stub: Any, message: pb.GenerateTokensRequest) -> list[int]:
    tokens: list[int] = []
    async for response in stub.GenerateTokens(message, timeout=60):
        tokens += response.token_ids
    return tokens


def test_what_is_drawn_depends_on_history_seed_and_sample() -> None:
    first = oracle.next_token([7, 8, 9], 1, 0)
    assert first == oracle.next_token([7, 8, 9], 1, 0)
    assert 300 <= first < 3300
    drawn = {oracle.next_token(*key) for key in (([7, 8], 1, 0), ([8, 7, 9], 1, 0), ([7, 8, 9], 2, 0))}
    assert first not in drawn
    assert first != oracle.next_token([7, 8, 9], 1, 1)


def test_expected_tokens_feed_on_themselves() -> None:
    whole = oracle.expected_tokens([5, 6], 3, 1, 20)
    assert len(whole) == 20
    assert oracle.expected_tokens([5, 6], 3, 1, 20, emitted_ids=whole[:7]) == whole
    assert oracle.expected_tokens([5, 6, *whole[:7]], 3, 1, 13) == whole[7:]
    assert oracle.expected_tokens([5, 6], 3, 1, 20, stop_ids=[whole[4]]) == whole[: whole.index(whole[4]) + 1]


async def test_crowded_streams_are_the_oracles() -> None:
    """Few blocks, so that sequences are preempted, and shared heads, so that blocks and copies are reused."""
    rng, pool = random.Random(1), []
    wanted = [(prompt_of(rng, pool), rng.getrandbits(64), rng.randint(1, 60), i % 3) for i in range(60)]
    # Steps of no time would end requests as fast as a busy machine sends them, one by one.
    async with MockEngine(step_ms=5, num_blocks=48, max_batch_size=32) as engine:
        async with stub_of(engine.address) as stub:
            streams = [
                generate(stub, request(prompt, seed, length, sample_index=sample))
                for prompt, seed, length, sample in wanted
            ]
            got = await asyncio.gather(*streams)
            load = await stub.GetLoad(pb.GetLoadRequest())
    for tokens, (prompt, seed, length, sample) in zip(got, wanted, strict=True):
        assert tokens == oracle.expected_tokens(prompt, seed, sample, length)
    assert load.preemptions > 0
    assert load.prefix_cache_hits > 0
    assert load.requests_begun == load.requests_ended == 60
    assert load.active_blocks == 0


async def test_a_resume_goes_on_where_it_stopped_and_logprobs_are_told() -> None:
    whole = oracle.expected_tokens([9, 10, 11], 5, 2, 30)
    async with MockEngine(step_ms=0) as engine, stub_of(engine.address) as stub:
        rest = request(
            [9, 10, 11], 5, 30, sample_index=2, emitted_token_ids=whole[:11], sampling={"logprobs": 2}
        )
        told = []
        async for response in stub.GenerateTokens(rest, timeout=60):
            assert len(response.logprobs) == len(response.token_ids)
            for token_id, entry in zip(response.token_ids, response.logprobs, strict=True):
                assert entry.logprob == oracle.logprob(token_id)
                pairs = tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True))
                assert pairs == oracle.top_logprobs(token_id, 2)
                told.append(token_id)
    assert told == whole[11:]


async def test_a_killed_engine_starts_again_at_its_address() -> None:
    async with MockEngine(step_ms=0) as engine:
        address = engine.address
        await engine.kill()
        async with stub_of(address) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(stub, request([7], 1, 3))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await engine.start()
        assert engine.address == address
        async with stub_of(address) as stub:
            assert await generate(stub, request([7], 1, 3)) == oracle.expected_tokens([7], 1, 0, 3)


async def test_a_step_hangs_until_it_is_released() -> None:
    async with MockEngine(step_ms=0) as engine, stub_of(engine.address) as stub:
        engine.runner.hang_next()
        call = asyncio.create_task(generate(stub, request([7], 1, 3)))
        await asyncio.sleep(0.3)
        assert not call.done()
        engine.runner.release()
        async with asyncio.timeout(10):
            assert await call == oracle.expected_tokens([7], 1, 0, 3)


def core_over(runner: HashRunner, num_blocks: int, block_size: int, batch: int) -> EngineCore:
    blocks = BlockManager(num_blocks, block_size)
    config = SchedulerConfig(max_batch_size=batch, max_batched_tokens=8192)
    return EngineCore(runner, Scheduler(config, blocks), blocks, CoreLimits(4096, 4096, 512))


def drawn_by(core: EngineCore, key: str, *, swap_at: int | None = None) -> list[int]:
    """The tokens of one key; before one step two entries of its block table are swapped."""
    tokens: list[int] = []
    step = 0
    while core.has_work():
        if step == swap_at:
            table = core.scheduler.running[0].block_table
            table[0], table[1] = table[1], table[0]
        report = core.step()
        step += 1
        tokens += [event.token_id for event in report.tokens if event.key == key]
    return tokens


def test_a_wrong_block_table_shows_in_the_next_token() -> None:
    prompt = list(range(10, 50))
    runner = HashRunner(8, 16)
    core = core_over(runner, 8, 16, 4)
    core.add(Sequence("a", prompt, SamplingParams(max_tokens=6, seed=1)))
    tokens = drawn_by(core, "a", swap_at=3)
    expected = oracle.expected_tokens(prompt, 1, 0, 6)
    assert tokens[:3] == expected[:3]
    assert tokens[3] != expected[3]


def test_a_slot_that_nobody_wrote_fails_the_sequence() -> None:
    runner = HashRunner(8, 16)
    with pytest.raises(UnwrittenSlots):
        runner.copy_blocks([(0, 1, 4)])  # type: ignore[list-item]
    core = core_over(runner, 8, 16, 4)
    core.add(Sequence("a", list(range(10, 30)), SamplingParams(max_tokens=6, seed=1)))
    core.step()
    runner.memory[core.scheduler.running[0].block_table[0]][3] = 0xFFFFFFFF
    ends = core.step().finished
    assert [end.reason.value for end in ends] == ["error"]


def test_it_is_fast_enough_to_load_a_gateway() -> None:
    """Steps alone, of 256 sequences; far below what an idle core does, for machines that are busy."""
    core = core_over(HashRunner(8192, 16), 8192, 16, 256)
    for index in range(256):
        core.add(Sequence(index, list(range(10, 60)), SamplingParams(max_tokens=40, seed=index)))
    began = time.process_time()
    num_tokens = 0
    while core.has_work():
        num_tokens += len(core.step().tokens)
    assert num_tokens == 256 * 40
    assert num_tokens / (time.process_time() - began) > 15_000


def test_bad_flags_are_named() -> None:
    for fields, flag in (({"step_ms": -1.0}, "--step-ms"), ({"vocabulary": 0}, "--vocabulary")):
        with pytest.raises(ConfigError) as caught:
            MockConfig(**fields)
        assert caught.value.flag == flag
    with pytest.raises(ConfigError) as caught:
        MockConfig(block_size=17)
    assert caught.value.flag == "--block-size"


def events_of(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """The first event of this name on the process's standard error."""
    assert process.stderr is not None
    for line in process.stderr:
        event: dict[str, Any] = json.loads(line)
        if event.get("event") == name:
            return event
    raise AssertionError(f"no {name!r} came")


async def test_as_a_process_it_serves_hangs_and_stops() -> None:
    command = [sys.executable, "-m", "tools.mock_engine", "serve", "--step-ms", "1", "--hang-seconds", "0.5"]
    process = subprocess.Popen(  # noqa: ASYNC220 - a few milliseconds
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        address = (await asyncio.to_thread(events_of, process, "serving"))["address"]
        async with stub_of(address) as stub:
            info = await stub.GetInfo(pb.GetInfoRequest())
            assert info.tokenizer_digest.startswith("sha256:")
            assert info.is_deterministic
            assert info.numerics_id == "mock"
            os.kill(process.pid, signal.SIGUSR2)
            began = time.monotonic()
            assert await generate(stub, request([7], 1, 3)) == oracle.expected_tokens([7], 1, 0, 3)
            assert time.monotonic() - began > 0.4
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
        process.wait()
