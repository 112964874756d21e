"""The Connect stream as a gateway sees it: hello, frames, cancel, pause, heartbeats."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from tests.services.engine.rpc.harness import (
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


async def test_an_idle_engine_beats_every_second_and_says_what_it_has():
    async with running_engine() as engine, linked(engine) as gateway:
        begin = time.monotonic()
        await gateway.read_until(lambda: len(gateway.heartbeats) == 2, within_s=10)
        assert time.monotonic() - begin > 1.5
        beat = gateway.heartbeats[-1]
        assert (beat.running, beat.waiting, beat.waiting_tokens) == (0, 0, 0)
        assert beat.free_blocks == engine.core.blocks.num_blocks


async def test_heartbeats_say_what_is_to_be_computed():
    async with running_engine() as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.7
        for slot in range(3):
            await gateway.call.write(submit(slot, PROMPT, 4))
        await gateway.read_until(lambda: any(beat.running + beat.waiting for beat in gateway.heartbeats))
        await gateway.read_until(lambda: len(gateway.finished) == 3, within_s=20)
        beats = gateway.heartbeats
        assert max(beat.running + beat.waiting for beat in beats) == 3
        assert max(beat.waiting_tokens for beat in beats) >= len(PROMPT)
        assert beats[-1].tokens_per_second > 0


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
