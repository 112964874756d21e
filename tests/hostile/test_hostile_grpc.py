"""The list's fields over gRPC, on Generate and on Multiplex alike: the status, and nobody else disturbed."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, NamedTuple

import grpc
import pytest

from tests.hostile.hostile_cases import GENERATE, OK, Case, varint
from tests.hostile.hostile_stack import CODES, Stack, running_stack, token_request
from tools.mock_engine.oracle import expected_tokens
from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

pytestmark = pytest.mark.asyncio(loop_scope="module")
# No case is about it: a deadline that a busy machine does not meet.
ANSWER_S = 120.0


class Answer(NamedTuple):
    status: str
    fields: list[str]
    message: str
    events: list[pb.GenerateResponse]

    def tokens(self, sample: int = 0) -> list[int]:
        return [i for e in self.events if e.delta.sample_index == sample for i in e.delta.token_ids]


async def generate(stack: Stack, data: bytes) -> Answer:
    call = stack.channel.unary_stream(
        "/weft.v1.GatewayService/Generate", response_deserializer=pb.GenerateResponse.FromString
    )(data, timeout=ANSWER_S)
    events = []
    try:
        events = [event async for event in call]
    except grpc.aio.AioRpcError as error:
        found = error_from_call(error)
        return Answer(
            error.code().name, [f for f, _ in found.field_violations], error.details() or "", events
        )
    finally:
        call.cancel()
    return Answer(OK, [], "", events)


async def multiplex(stack: Stack, data: bytes, stream_id: int = 5) -> Answer:
    """The same request as one of a call; the call itself may fail when a message cannot be read."""
    message = b"\x08" + varint(stream_id) + b"\x12" + varint(len(data)) + data
    call = stack.channel.stream_stream(
        "/weft.v1.GatewayService/Multiplex", response_deserializer=pb.MultiplexResponse.FromString
    )(iter([message]), timeout=ANSWER_S)
    events = []
    try:
        async for response in call:
            if response.HasField("response"):
                events.append(response.response)
            elif response.end.HasField("failure"):
                failure = response.end.failure
                names = [violation.field for violation in failure.field_violations]
                return Answer(CODES[failure.code], names, failure.message, events)
            else:
                return Answer(OK, [], "", events)
    except grpc.aio.AioRpcError as error:
        found = error_from_call(error)
        return Answer(
            error.code().name, [f for f, _ in found.field_violations], error.details() or "", events
        )
    finally:
        call.cancel()
    raise AssertionError("the stream ended without an end")


FACES = {"generate": generate, "multiplex": multiplex}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("case", GENERATE, ids=lambda case: case.id)
async def test_field(stack: Stack, case: Case, face: str) -> None:
    data = case.data()
    async with stack.watched():
        answer = await FACES[face](stack, data)
    assert answer.status == case.status, answer.message
    if case.field:
        # Of a stream's request the path begins one level higher.
        assert case.field in {answer.fields[0], answer.fields[0].removeprefix("generate.")}
        assert len(answer.fields) <= 20
        assert answer.fields[0] in answer.message
    if case.status == OK:
        check_tokens(case, data, answer)


def check_tokens(case: Case, data: bytes, answer: Answer) -> None:
    """What was accepted is answered as the oracle says, as far as the prompt's ids are known."""
    request = pb.GenerateRequest.FromString(data)
    finishes = [event.finish for event in answer.events if event.HasField("finish")]
    assert len(finishes) == max(1, request.sampling.n)
    if request.WhichOneof("prompt") != "token_ids":
        return
    prompt = list(request.token_ids.ids)
    room = 1024 - len(prompt)
    wanted = request.sampling.max_tokens or room
    for sample in range(max(1, request.sampling.n)):
        assert answer.tokens(sample) == expected_tokens(prompt, request.sampling.seed, sample, wanted)


@pytest.mark.parametrize("face", FACES)
async def test_H008_more_than_the_cache_holds(face: str) -> None:
    """A sequence that can never fit is FAILED_PRECONDITION; many that fit one by one wait for each other."""
    async with running_stack(engine={"num_blocks": 16, "block_size": 16}) as small:
        too_long = token_request([300] * 3, 300, 1).SerializeToString()
        answer = await FACES[face](small, too_long)
        assert answer.status == "FAILED_PRECONDITION", answer
        many = token_request([300] * 3, 150, 1)
        many.sampling.n = 4
        answer = await FACES[face](small, many.SerializeToString())
        assert answer.status == OK, answer
        for sample in range(4):
            assert answer.tokens(sample) == expected_tokens([300] * 3, 1, sample, 150)
        await small.idle()


async def test_H006_n_1e6_is_refused_at_once(stack: Stack) -> None:
    """The bound is of CPU time: no sample may have been made."""
    request = pb.GenerateRequest(text="x", sampling=gen.SamplingParams(n=10**6)).SerializeToString()
    before = stack.report.counters.begun
    async with stack.watched(max_hold_s=0.1):
        answer = await generate(stack, request)
    assert answer.status == "INVALID_ARGUMENT"
    assert stack.report.counters.begun - before <= 10  # the probe and the bystanders' own


async def test_H031_penalties_and_logprobs_crossed(stack: Stack) -> None:
    values = itertools.product((None, 1.5), (None, -2.0), (None, 2.0), (None, 0, 20), (1, 2), (0.0, 1.0))
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs", "n", "temperature")

    async def one(combination: tuple[Any, ...]) -> None:
        request = token_request([400, 401], 3, 9)
        for name, value in zip(names, combination, strict=True):
            if value is not None:
                setattr(request.sampling, name, value)
        answer = await generate(stack, request.SerializeToString())
        assert answer.status == OK, combination
        for sample in range(request.sampling.n):
            assert answer.tokens(sample) == expected_tokens([400, 401], 9, sample, 3)

    async with stack.watched():
        await asyncio.gather(*map(one, values))


async def test_H048_prefixes_that_look_alike(stack: Stack) -> None:
    """Ids and salts that some way of joining them would confuse: each has its own tokens."""
    prompts = [[1, 23] * 30, [12, 3] * 30, [123] * 60, [300] * 64, [300] * 65, [300] * 63 + [301]]
    async with stack.watched():
        for _ in range(2):
            for prompt, salt in itertools.product(prompts, ("", "a", "aa", ",")):
                request = token_request(prompt, 4, 3, cache_salt=salt)
                answer = await generate(stack, request.SerializeToString())
                assert answer.tokens() == expected_tokens(prompt, 3, 0, 4), (prompt[:3], salt)


async def churn(stack: Stack, num_requests: int) -> None:
    """Unique prompts of one token, hundreds at a time on one call."""
    call = stack.stub.Multiplex()
    found: dict[int, list[int]] = {}
    room = asyncio.Semaphore(100)

    async def read() -> None:
        num_ended = 0
        async for message in call:
            found.setdefault(message.stream_id, []).extend(message.response.delta.token_ids)
            if message.HasField("end"):
                assert not message.end.HasField("failure"), message.end
                room.release()
                num_ended += 1
                if num_ended == num_requests:
                    return

    reader = asyncio.create_task(read())
    for number in range(num_requests):
        await room.acquire()
        request = token_request([300 + number % 3700], 1, number)
        await call.write(pb.MultiplexRequest(stream_id=number, generate=request))
    await reader
    call.cancel()
    for number in range(num_requests):
        assert found[number] == expected_tokens([300 + number % 3700], number, 0, 1)


async def test_H049_prompts_of_one_token(stack: Stack) -> None:
    async with stack.watched():
        await churn(stack, 1000)
    counts = stack.report.blocks
    assert counts.free + counts.active + counts.cached == 512


@pytest.mark.slow
async def test_H049_prompts_of_one_token_1e4(stack: Stack) -> None:
    async with stack.watched():
        await churn(stack, 10_000)
