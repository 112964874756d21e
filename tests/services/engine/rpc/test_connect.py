"""The Connect stream as a gateway sees it: hello, frames, credit, pause, cancel, heartbeats, drain, ends."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.services.engine.rpc.harness import (
    MAX_MODEL_LEN,
    VOCABULARY,
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
CODES = {code.value[0]: code for code in grpc.StatusCode}


async def ends_with(call) -> grpc.aio.AioRpcError:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")


async def test_hello_comes_first_and_says_what_the_engine_is():
    async with running_engine() as engine, linked(engine) as one, linked(engine) as two:
        assert one.hello.protocol_version == 1
        assert one.hello.info == engine.info
        assert one.epoch
        assert one.epoch != two.epoch


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (pb.ConnectRequest(), "INVALID_ARGUMENT"),
        (submit(0, PROMPT), "INVALID_ARGUMENT"),
        (pb.ConnectRequest(hello=pb.GatewayHello(protocol_version=0)), "FAILED_PRECONDITION"),
        (pb.ConnectRequest(hello=pb.GatewayHello(protocol_version=2)), "FAILED_PRECONDITION"),
        (
            pb.ConnectRequest(hello=pb.GatewayHello(protocol_version=1, gateway_id="x" * 129)),
            "INVALID_ARGUMENT",
        ),
    ],
)
async def test_a_link_that_does_not_begin_with_a_good_hello_is_refused(first, code):
    async with running_engine() as engine:
        call = engine.stub.Connect()
        await call.write(first)
        assert (await ends_with(call)).code().name == code


async def test_a_link_that_ends_without_a_hello_is_refused():
    async with running_engine() as engine:
        call = engine.stub.Connect()
        await call.done_writing()
        assert (await ends_with(call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_link_that_never_says_hello_is_dropped(monkeypatch):
    monkeypatch.setattr("services.engine.rpc.link.HELLO_TIMEOUT_S", 0.1)
    async with running_engine() as engine:
        assert (await ends_with(engine.stub.Connect())).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_second_hello_and_an_empty_command_end_the_link():
    async with running_engine() as engine:
        for message in (pb.ConnectRequest(hello=pb.GatewayHello(protocol_version=1)), pb.ConnectRequest()):
            async with linked(engine) as gateway:
                await gateway.call.write(message)
                assert (await ends_with(gateway.call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_message_end_the_link():
    async with running_engine() as engine, linked(engine) as other:
        raw = engine.channel.stream_stream("/weft.v1.EngineService/Connect")
        for payload in (b"\xff\xff\xff", b"\x0a\x03\x12\x01\xff"):
            call = raw()
            await call.write(payload)
            assert (await ends_with(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
        await other.call.write(submit(0, PROMPT))
        await other.read_until(lambda: other.finished)


async def test_many_sequences_share_frames_and_every_token_arrives_once():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.005
        prompts = {slot: [slot, *PROMPT] for slot in range(40)}
        for slot, prompt in prompts.items():
            await gateway.call.write(submit(slot, prompt, 20, seed=slot))
        await gateway.read_until(lambda: len(gateway.finished) == 40)
        assert sorted(gateway.accepted) == list(range(40))
        for slot, prompt in prompts.items():
            assert gateway.tokens[slot] == expected(prompt, 20, seed=slot)
            end = gateway.finished[slot]
            assert end.reason == generation_pb2.FINISH_REASON_LENGTH
            assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (9, 20)
            assert end.receipt.total_ms >= end.receipt.first_token_ms > 0
        assert max(len(frame.slots) for frame in gateway.frames) > 20
        steps = [frame.step for frame in gateway.frames]
        assert steps == sorted(steps)


async def test_logprobs_come_with_the_entries_that_asked():
    async with running_engine() as engine, linked(engine) as gateway:
        await gateway.call.write(submit(0, PROMPT, 4))
        await gateway.call.write(submit(1, PROMPT, sampling=sampling(4, logprobs=0)))
        await gateway.call.write(submit(2, PROMPT, sampling=sampling(4, logprobs=3)))
        await gateway.read_until(lambda: len(gateway.finished) == 3)
        assert gateway.logprobs[0] == [None] * 4
        assert [entry.logprob for entry in gateway.logprobs[1]] == [-0.5] * 4
        assert [list(entry.top_token_ids) for entry in gateway.logprobs[1]] == [[]] * 4
        assert [list(entry.top_token_ids) for entry in gateway.logprobs[2]] == [[0, 1, 2]] * 4
        assert [list(entry.top_logprobs) for entry in gateway.logprobs[2]] == [[-1.0, -2.0, -3.0]] * 4


@pytest.mark.parametrize("num_emitted", [0, 1, 5, 9, 10])
async def test_a_resume_goes_on_where_it_stopped(num_emitted):
    whole = expected(PROMPT, 10)
    async with running_engine() as engine, linked(engine) as gateway:
        await gateway.call.write(submit(7, PROMPT, 10, emitted_token_ids=whole[:num_emitted]))
        await gateway.read_until(lambda: gateway.finished)
        assert gateway.tokens.get(7, []) == whole[num_emitted:]
        assert gateway.first_position.get(7, num_emitted) == num_emitted
        assert gateway.finished[7].usage.completion_tokens == 10


async def test_a_cancel_is_answered_by_one_end_and_an_unknown_slot_is_ignored():
    async with running_engine() as engine, linked(engine) as gateway:
        await gateway.send(cancel=pb.Cancel(slot=99))
        await gateway.call.write(submit(0, PROMPT, 1_500))
        await gateway.read_until(lambda: len(gateway.tokens.get(0, [])) > 3)
        for _ in range(3):
            await gateway.send(cancel=pb.Cancel(slot=0))
        await gateway.read_until(lambda: gateway.finished)
        assert gateway.finished[0].reason == generation_pb2.FINISH_REASON_CANCELLED
        await gateway.call.write(submit(1, PROMPT))  # a second end of slot 0 would fail inside
        await gateway.read_until(lambda: 1 in gateway.finished)


async def test_a_slot_is_free_again_after_its_end():
    async with running_engine() as engine, linked(engine) as gateway:
        for _ in range(3):
            await gateway.call.write(submit(0, PROMPT))
            await gateway.read_until(lambda: gateway.finished)
            assert gateway.tokens.pop(0) == expected(PROMPT, 5)
            gateway.finished.clear()


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


async def test_a_failing_sequence_ends_alone_as_internal():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        for slot in range(3):
            await gateway.call.write(submit(slot, [slot, *PROMPT], 30))
        await gateway.read_until(lambda: len(gateway.tokens) == 3)
        (key,) = [key for key in engine.core._live if key[1] == 1]
        engine.runner.fail["sample", key] = RuntimeError("secret")
        await gateway.read_until(lambda: len(gateway.finished) == 3)
        failure = gateway.finished[1].failure
        assert gateway.finished[1].reason == generation_pb2.FINISH_REASON_ERROR
        assert CODES[failure.code] is grpc.StatusCode.INTERNAL
        assert failure.error_id
        assert "secret" not in failure.message
        for slot in (0, 2):
            assert gateway.tokens[slot] == expected([slot, *PROMPT], 30)


async def test_a_bug_in_the_delivery_ends_the_link_and_not_in_silence(monkeypatch):
    def broken(slot, event):
        raise RuntimeError("secret")

    async with running_engine() as engine, linked(engine) as gateway:
        monkeypatch.setattr("services.engine.rpc.convert.finished", broken)
        await gateway.call.write(submit(0, PROMPT, 3))
        error = await ends_with(gateway.call)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()


async def test_a_bug_in_the_conversion_rejects_one_submit(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("secret")

    async with running_engine() as engine, linked(engine) as gateway:
        with monkeypatch.context() as patch:
            patch.setattr("services.engine.rpc.convert.sequence", broken)
            await gateway.call.write(submit(0, PROMPT, 3))
            await gateway.read_until(lambda: gateway.rejected)
        assert CODES[gateway.rejected[0].code] is grpc.StatusCode.INTERNAL
        assert gateway.rejected[0].error_id
        await gateway.call.write(submit(0, PROMPT, 3))
        await gateway.read_until(lambda: gateway.finished)


async def test_pause_stops_a_slot_and_resume_goes_on():
    async with running_engine() as engine, linked(engine) as gateway:
        await gateway.call.write(submit(0, PROMPT, 600))
        await gateway.read_until(lambda: len(gateway.tokens.get(0, [])) > 5)
        await gateway.send(pause=pb.Pause(slot=0))
        await eventually(lambda: engine.loop.load().num_paused == 1)
        steps = engine.core.report().counters.steps
        await asyncio.sleep(0.1)
        assert engine.core.report().counters.steps == steps
        await gateway.send(resume=pb.Resume(slot=0))
        await gateway.read_until(lambda: gateway.finished)
        assert gateway.tokens[0] == expected(PROMPT, 600)


async def test_heartbeats_come_while_something_is_live_and_only_then():
    async with running_engine() as engine, linked(engine) as gateway:
        with pytest.raises(TimeoutError):
            await gateway.read_until(lambda: gateway.heartbeats, within_s=0.5)


async def test_heartbeats_come_while_a_step_hangs():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 1.0
        await gateway.call.write(submit(0, PROMPT, 1))
        await gateway.read_until(lambda: len(gateway.heartbeats) >= 3, within_s=2)
        elapsed = [beat.step_elapsed_ms for beat in gateway.heartbeats]
        assert elapsed == sorted(elapsed)
        assert elapsed[-1] > 300
        assert gateway.heartbeats[-1].step_bound_ms > 0
        assert not gateway.tokens
        await gateway.read_until(lambda: gateway.finished)


async def test_without_credit_frames_wait_and_then_come_together():
    async with running_engine() as engine, linked(engine, credit=0) as gateway:
        for slot in range(3):
            await gateway.call.write(submit(slot, [slot, *PROMPT], 200))
        await eventually(lambda: engine.core.report().counters.generation_tokens == 600)
        await asyncio.sleep(0.1)
        await gateway.read_until(lambda: len(gateway.accepted) == 3)
        await gateway.send(credit=pb.FrameCredit(bytes=1 << 20))
        await gateway.read_until(lambda: len(gateway.finished) == 3)
        assert len(gateway.frames) == 1
        for slot in range(3):
            assert gateway.tokens[slot] == expected([slot, *PROMPT], 200)


async def test_credit_is_never_overdrawn_and_nothing_is_lost_in_drips():
    async with running_engine() as engine, linked(engine, credit=100) as gateway:
        granted = 100
        await gateway.call.write(submit(0, PROMPT, sampling=sampling(50, logprobs=2)))
        while not gateway.finished:
            try:
                await asyncio.wait_for(asyncio.shield(reading := asyncio.ensure_future(gateway.read())), 0.05)
            except TimeoutError:
                granted += 150
                await gateway.send(credit=pb.FrameCredit(bytes=150))
                await reading
            assert sum(frame.ByteSize() for frame in gateway.frames) <= granted
        assert gateway.tokens[0] == expected(PROMPT, 50)


async def test_credit_beyond_all_numbers_does_not_overflow():
    async with running_engine() as engine, linked(engine, credit=2**64 - 1) as gateway:
        await gateway.send(credit=pb.FrameCredit(bytes=2**64 - 1))
        await gateway.call.write(submit(0, PROMPT))
        await gateway.read_until(lambda: gateway.finished)


async def test_a_link_that_never_gives_credit_is_dropped_and_its_sequences_cancelled(monkeypatch):
    monkeypatch.setattr("services.engine.rpc.outbox.MAX_PENDING_BYTES", 2_000)
    async with running_engine() as engine, linked(engine, credit=0) as gateway, linked(engine) as other:
        await other.call.write(submit(0, PROMPT, 400))
        for slot in range(4):
            await gateway.call.write(submit(slot, PROMPT, 1_900))
        assert (await ends_with(gateway.call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await eventually(lambda: engine.core.num_live <= 1)
        await other.read_until(lambda: other.finished)
        assert other.tokens[0] == expected(PROMPT, 400)


async def test_a_link_with_credit_that_does_not_read_is_dropped_too(monkeypatch):
    monkeypatch.setattr("services.engine.rpc.outbox.MAX_PENDING_BYTES", 20_000)
    async with running_engine() as engine:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        async with grpc.aio.insecure_channel(str(engine.server.address), options=options) as channel:
            engine.stub = type(engine.stub)(channel)
            engine.runner.step_s = 0
            async with linked(engine) as gateway:
                for slot in range(40):
                    await gateway.call.write(submit(slot, [slot], sampling=sampling(1_900, logprobs=20)))
                await eventually(lambda: engine.core.report().counters.begun > 0)
                await eventually(lambda: not engine.core.num_live and not engine.servicer._links, within_s=10)


@pytest.mark.parametrize("how", ["cancel", "half-close", "channel"])
async def test_when_the_link_ends_all_that_came_over_it_ends(how):
    async with running_engine() as engine:
        channel = grpc.aio.insecure_channel(str(engine.server.address))
        stub, engine.stub = engine.stub, type(engine.stub)(channel)
        async with linked(engine) as gateway, asyncio.timeout(10):
            engine.runner.step_s = 0.01
            for slot in range(8):
                await gateway.call.write(submit(slot, [slot, *PROMPT], 1_900))
            await gateway.read_until(lambda: len(gateway.tokens) == 8)
            if how == "cancel":
                gateway.call.cancel()
            elif how == "channel":
                await channel.close()
            else:
                await gateway.call.done_writing()
                while await gateway.read() is not None:
                    pass
                assert await gateway.call.code() is grpc.StatusCode.OK
            await eventually(lambda: engine.core.num_live == 0, within_s=2)
        await channel.close()
        engine.stub = stub


async def test_two_hundred_links_and_calls_that_break_leave_nothing_behind():
    async with running_engine(num_blocks=256) as engine:
        engine.runner.step_s = 0.0005

        async def one(number: int) -> None:
            if number % 2:
                async with linked(engine) as gateway:
                    await gateway.call.write(submit(number, [number % 90, *PROMPT], 200))
                    await asyncio.sleep(number % 7 / 100)
            else:
                request = pb.GenerateTokensRequest(prompt_token_ids=PROMPT, sampling=sampling(200))
                call = engine.stub.GenerateTokens(request)
                await asyncio.sleep(number % 11 / 100)
                call.cancel()

        for start in range(0, 200, 25):
            await asyncio.gather(*(one(number) for number in range(start, start + 25)))


async def test_a_drain_is_announced_lets_run_what_runs_and_refuses_the_rest():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.005
        await gateway.call.write(submit(0, PROMPT, 60))
        await gateway.read_until(lambda: gateway.tokens)
        drain = engine.stub.Drain(pb.DrainRequest(deadline_ms=10_000))
        await gateway.read_until(lambda: gateway.draining)
        assert gateway.draining[0].deadline_ms == 10_000
        await gateway.call.write(submit(1, PROMPT))
        await gateway.read_until(lambda: gateway.finished and gateway.rejected)
        assert gateway.tokens[0] == expected(PROMPT, 60)
        assert CODES[gateway.rejected[1].code] is grpc.StatusCode.UNAVAILABLE
        assert gateway.rejected[1].retry_after_ms > 0
        progress = [response.live async for response in drain]
        assert progress[-1] == 0
        assert progress[0] == 1
        async with linked(engine) as late:
            await late.read_until(lambda: late.draining)
        assert (await engine.stub.GetLoad(pb.GetLoadRequest())).is_draining


async def test_a_drain_past_its_deadline_cancels():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        await gateway.call.write(submit(0, PROMPT, 1_900))
        await gateway.read_until(lambda: gateway.tokens)
        progress = [response.live async for response in engine.stub.Drain(pb.DrainRequest(deadline_ms=0))]
        assert progress[-1] == 0
        await gateway.read_until(lambda: gateway.finished)
        assert gateway.finished[0].reason == generation_pb2.FINISH_REASON_CANCELLED


async def test_a_device_fault_ends_every_stream_as_unavailable():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        await gateway.call.write(submit(0, PROMPT, 1_900))
        request = pb.GenerateTokensRequest(prompt_token_ids=PROMPT, sampling=sampling(1_900))
        call = engine.stub.GenerateTokens(request)
        await gateway.read_until(lambda: gateway.tokens)
        await call.read()
        key = next(iter(engine.core._live))
        engine.runner.fail["forward", key] = RuntimeError("CUDA error: an illegal memory access")
        for stream in (gateway.call, call):
            error = await ends_with(stream)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "CUDA" not in error.details()
        assert len(engine.faults) == 1
        for late in (engine.stub.Connect(), engine.stub.GenerateTokens(request)):
            assert (await ends_with(late)).code() is grpc.StatusCode.UNAVAILABLE
