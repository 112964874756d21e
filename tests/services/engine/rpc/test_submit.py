"""What a Submit may ask for, what refuses it, and what its deadline does."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.services.engine.rpc.harness import (
    CODES,
    MAX_MODEL_LEN,
    VOCABULARY,
    ends_with,
    eventually,
    expected,
    linked,
    running_engine,
    sampling,
    submit,
)
from weft.v1 import engine_service_pb2 as pb
from weft.v1 import generation_pb2

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


async def test_a_live_slot_is_not_taken_twice():
    async with running_engine() as engine, linked(engine) as gateway:
        await gateway.call.write(submit(0, PROMPT, 300))
        await gateway.call.write(submit(0, PROMPT, 5))
        await gateway.read_until(lambda: gateway.finished)
        assert CODES[gateway.rejected[0].code] is grpc.StatusCode.ALREADY_EXISTS
        assert gateway.tokens[0] == expected(PROMPT, 300)


SAMPLING = generation_pb2.SamplingParams


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (submit(0, []), "prompt_token_ids"),
        (submit(0, [VOCABULARY]), "prompt_token_ids[0]"),
        (submit(0, [0, 2**32 - 1]), "prompt_token_ids[1]"),
        (submit(0, PROMPT, emitted_token_ids=[VOCABULARY]), "emitted_token_ids[0]"),
        (submit(0, PROMPT, 3, emitted_token_ids=[1, 2, 3, 4]), "emitted_token_ids"),
        (submit(0, [1] * MAX_MODEL_LEN), "prompt_token_ids"),
        (submit(0, [1] * 100_000), "prompt_token_ids"),
        (submit(0, [1] * (MAX_MODEL_LEN - 5), 6), "sampling.max_tokens"),
        (submit(0, PROMPT, 0), "sampling.max_tokens"),
        (submit(0, PROMPT, 2**31), "sampling.max_tokens"),
        (submit(0, PROMPT, sampling=SAMPLING(max_tokens=5)), "sampling.seed"),
        (submit(0, PROMPT, sampling=SAMPLING(seed=5)), "sampling.max_tokens"),
        (submit(0, PROMPT, sampling=sampling(5, n=2)), "sampling.n"),
        (submit(0, PROMPT, sampling=sampling(5, temperature=float("nan"))), "sampling.temperature"),
        (submit(0, PROMPT, sampling=sampling(5, temperature=-1)), "sampling.temperature"),
        (submit(0, PROMPT, sampling=sampling(5, top_p=0)), "sampling.top_p"),
        (submit(0, PROMPT, sampling=sampling(5, top_p=2)), "sampling.top_p"),
        (submit(0, PROMPT, sampling=sampling(5, logprobs=21)), "sampling.logprobs"),
        (submit(0, PROMPT, sampling=sampling(5, stop_token_ids=[VOCABULARY])), "sampling.stop_token_ids[0]"),
        (submit(0, PROMPT, sampling=sampling(5, min_tokens=6)), "sampling.min_tokens"),
        (submit(0, PROMPT, priority=101), "priority"),
        (submit(0, PROMPT, request_id="a b"), "request_id"),
        (submit(0, PROMPT, cache_salt="x" * 257), "cache_salt"),
        (submit(0, PROMPT, retain_seconds=86_401), "retain_seconds"),
    ],
)  # fmt: skip
async def test_a_bad_submit_is_rejected_alone(bad, field):
    async with running_engine() as engine, linked(engine) as gateway:
        await gateway.call.write(submit(1, PROMPT))
        await gateway.call.write(bad)
        await gateway.read_until(lambda: gateway.rejected and gateway.finished)
        failure = gateway.rejected[0]
        assert CODES[failure.code] is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in failure.field_violations] == [field]
        assert gateway.tokens[1] == expected(PROMPT, 5)


async def test_what_never_fits_and_what_comes_too_many():
    async with running_engine(num_blocks=4, max_queue_size=2, max_batch_size=1) as engine:
        async with linked(engine) as gateway:
            engine.runner.step_s = 0.02
            await gateway.call.write(submit(0, PROMPT, 100))
            await gateway.read_until(lambda: gateway.rejected)
            assert CODES[gateway.rejected.pop(0).code] is grpc.StatusCode.FAILED_PRECONDITION
            for slot in range(6):
                await gateway.call.write(submit(slot, PROMPT, 30))
            await gateway.read_until(lambda: len(gateway.rejected) + len(gateway.finished) == 6)
            assert gateway.rejected
            for failure in gateway.rejected.values():
                assert CODES[failure.code] is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert failure.retry_after_ms > 0


async def test_a_full_queue_is_told_without_waiting_for_the_step():
    async with running_engine(max_queue_size=4, max_batch_size=1) as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.4
        await gateway.call.write(submit(0, PROMPT, 3))
        await eventually(lambda: engine.core.step_started_at is not None)
        started = asyncio.get_running_loop().time()
        for slot in range(1, 9):
            await gateway.call.write(submit(slot, PROMPT, 1))
        await gateway.read_until(lambda: len(gateway.rejected) == 4)
        assert asyncio.get_running_loop().time() - started < 0.2
        for failure in gateway.rejected.values():
            assert CODES[failure.code] is grpc.StatusCode.RESOURCE_EXHAUSTED
        await gateway.read_until(lambda: len(gateway.finished) == 5, within_s=20)


async def test_a_deadline_ends_a_slot_with_its_reason():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        await gateway.call.write(submit(0, PROMPT, 1_900, budget_ms=400))
        await gateway.read_until(lambda: gateway.finished)
        assert gateway.finished[0].reason == generation_pb2.FINISH_REASON_DEADLINE
        assert not gateway.finished[0].HasField("failure")
        assert gateway.tokens[0] == expected(PROMPT, len(gateway.tokens[0]))
        await gateway.call.write(submit(1, PROMPT, 5, budget_ms=0))
        await gateway.read_until(lambda: gateway.rejected)
        assert CODES[gateway.rejected[1].code] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_update_moves_the_deadline_and_a_bad_one_ends_the_link():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        await gateway.call.write(submit(0, PROMPT, 1_900))
        await gateway.read_until(lambda: gateway.tokens)
        await gateway.send(update=pb.Update(slot=0, budget_ms=100, priority=5))
        await gateway.read_until(lambda: gateway.finished)
        assert gateway.finished[0].reason == generation_pb2.FINISH_REASON_DEADLINE
        await gateway.send(update=pb.Update(slot=0, priority=101))
        assert (await ends_with(gateway.call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_blocks_of_a_retained_sequence_are_evicted_last():
    async with running_engine() as engine, linked(engine) as gateway:
        await gateway.call.write(submit(0, [5] * 40, 5, retain_seconds=86_400))
        await gateway.call.write(submit(1, [6] * 40, 5))
        await gateway.read_until(lambda: len(gateway.finished) == 2)
        assert engine.blocks.num_retained == 3
        assert engine.blocks.counts().cached == 6
