"""What a client is told is the same whether tokens go out one by one or together."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import pytest

from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

NUM_STREAMS = 48


class Told(NamedTuple):
    """Everything about one sample but how it was cut into messages."""

    text: str
    token_ids: list[int]
    logprobs: list[bytes]
    reason: int
    stop_string: str
    completion_tokens: int


def request(number: int) -> pb.GenerateRequest:
    sampling = gen.SamplingParams(seed=number, max_tokens=40 + number % 7, n=1 + number % 2)
    if number % 3 == 0:
        sampling.logprobs = 2
    # Some of these turn up in the made-up text, in the middle of a token or across two.
    stops = (["e", "\n\nUser:"], ["ing t"], [])[number % 3]
    return pb.GenerateRequest(text="Once", sampling=sampling, stop=stops)


async def told(stub: Any, number: int) -> tuple[list[Told], int]:
    """What each sample was told, and in how many messages."""
    samples: dict[int, list[pb.Delta]] = {}
    ends: dict[int, pb.Finish] = {}
    num_messages = 0
    call = stub.Generate(request(number), timeout=60)
    try:
        async for response in call:
            if response.HasField("delta"):
                delta = response.delta
                before = samples.setdefault(delta.sample_index, [])
                so_far = sum(len(one.text.encode()) for one in before)
                assert delta.next_offset == so_far + len(delta.text.encode())
                before.append(delta)
                num_messages += 1
            elif response.HasField("finish"):
                ends[response.finish.sample_index] = response.finish
    finally:
        call.cancel()
    found = []
    for index, end in sorted(ends.items()):
        deltas = samples.get(index, [])
        found.append(
            Told(
                "".join(delta.text for delta in deltas),
                [token_id for delta in deltas for token_id in delta.token_ids],
                [entry.SerializeToString() for delta in deltas for entry in delta.logprobs],
                end.reason,
                end.stop_string,
                end.usage.completion_tokens,
            )
        )
    return found, num_messages


async def test_the_same_with_and_without(start_engine: Any, start_gateway: Any) -> None:
    engine = await start_engine(step_s=0.001)
    answers, held = {}, {}
    for max_coalesce in (0.0, 20.0):
        gateway = await start_gateway(engine, max_coalesce=max_coalesce)
        found = await asyncio.gather(*(told(gateway.stub, number) for number in range(NUM_STREAMS)))
        answers[max_coalesce] = [samples for samples, _ in found]
        held[max_coalesce] = gateway.application.gateway.pacer.num_held
        await gateway.application.close()
    assert answers[0.0] == answers[20.0]
    assert {sample.reason for samples in answers[0.0] for sample in samples} >= {
        gen.FINISH_REASON_LENGTH,
        gen.FINISH_REASON_STOP,
    }
    # Not the number of messages: a machine that is busy enough sends several tokens together either way.
    assert held[20.0] > held[0.0] == 0


@pytest.mark.parametrize("max_coalesce", [0.0, 20.0])
async def test_an_idle_gateway_sends_each_token_as_it_comes(
    start_engine: Any, start_gateway: Any, max_coalesce: float
) -> None:
    """A step of 50 ms leaves time enough for one stream, even on a busy machine."""
    engine = await start_engine(step_s=0.05)
    gateway = await start_gateway(engine, max_coalesce=max_coalesce)
    _, num_messages = await told(gateway.stub, 8)
    assert num_messages >= 40
    assert gateway.application.gateway.pacer.num_held <= 5
