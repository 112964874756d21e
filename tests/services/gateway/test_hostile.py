"""What bad input gets over gRPC: the right status naming the field, quickly; nothing else is disturbed."""

from __future__ import annotations

import math
import time
from typing import Any

import grpc
import pytest
from google.protobuf import unknown_fields

from services.gateway.resolution import refuse_unknown_fields, tokenize
from weft.rpc.auth import Authenticator, hash_key
from weft.rpc.errors import StatusError, error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

S = gen.SamplingParams
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def text(prompt: str = "hi", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=prompt, **fields)


def ids(*token_ids: int, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids), **fields)


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    found = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return pb.GenerateRequest(chat=pb.ChatPrompt(messages=found))


async def drain(call: Any) -> list[Any]:
    return [response async for response in call]


async def refused(gateway: Any, request: pb.GenerateRequest) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drain(gateway.stub.Generate(request))
    return caught.value


async def test_a_thousand_bad_fields_stay_small(gateway: Any) -> None:
    biases = [S.LogitBias(token_id=2**32 - 1, bias=math.nan) for _ in range(300)]
    error = await refused(gateway, text(stop=[""] * 16, sampling=S(logit_bias=biases, top_p=2)))
    assert error.code() == INVALID
    assert len(error_from_call(error).field_violations) <= 20
    assert sum(len(key) + len(value) for key, value in error.trailing_metadata()) < 4096 + 512


async def test_unknown_fields_are_named_by_number(gateway: Any) -> None:
    request = text()
    request.MergeFromString(bytes([0x98, 0x06, 0x01]))  # field 99, varint 1
    assert len(unknown_fields.UnknownFieldSet(request)) == 1
    error = await refused(gateway, request)
    assert error.code() == INVALID
    assert "99" in error.details()
    nested = text(sampling=S(top_p=0.5))
    nested.sampling.MergeFromString(bytes([0x98, 0x06, 0x01]))
    assert "sampling.99" in (await refused(gateway, nested)).details()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.ListModels(pb.ListModelsRequest.FromString(bytes([0x98, 0x06, 0x01])))
    assert caught.value.code() == INVALID


@pytest.mark.parametrize("where", ["top", "nested"])
async def test_millions_of_unknown_fields_hold_nobody_up(where: str) -> None:
    unknown = bytes([0x98, 0x06, 0x01]) * 1_000_000
    request = text(sampling=S(top_p=0.5))
    (request if where == "top" else request.sampling).MergeFromString(unknown)
    begin = time.process_time()
    with pytest.raises(StatusError) as caught:
        refuse_unknown_fields(request)
    assert caught.value.code == INVALID
    assert time.process_time() - begin < 0.2
    many = text(sampling=S(logit_bias=[S.LogitBias()] * 500_000))
    begin = time.process_time()
    refuse_unknown_fields(many)
    assert time.process_time() - begin < 0.2


async def test_millions_of_token_ids_hold_nobody_up(gateway: Any) -> None:
    request = ids(*[300] * 2_000_000)
    begin = time.process_time()
    with pytest.raises(StatusError) as caught:
        await tokenize(request, gateway.link.assets, gateway.link.info)
    assert caught.value.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert time.process_time() - begin < 0.02
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await gateway.stub.Detokenize(pb.DetokenizeRequest(token_ids=[300] * 1_048_577))
    assert refusal.value.code() == INVALID


async def test_a_text_without_a_token(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that adds no begin token and drops what it does not know."""

    async def encode_text(text: str) -> list[int]:
        return []

    monkeypatch.setattr(gateway.link.assets.tokenizer, "encode_text", encode_text)
    error = await refused(gateway, text("\u3164"))
    assert error.code() == INVALID
    assert error_from_call(error).field_violations[0][0] == "text"


async def test_invalid_utf8_and_garbage(gateway: Any) -> None:
    call = gateway.channel.unary_stream(
        "/weft.v1.GatewayService/Generate",
        request_serializer=bytes,
        response_deserializer=pb.GenerateResponse.FromString,
    )
    for data in (b"\x12\x02\xff\xfe", b"\xff" * 40, b"\x12\xff\xff\xff\xff\x0f"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drain(call(data))
        assert caught.value.code() == INVALID


async def test_a_message_of_100_mb_is_refused(gateway: Any) -> None:
    error = await refused(gateway, text("x" * (100 << 20)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_from_call(error).retry_after_s is None


@pytest.mark.parametrize(
    "prompt",
    [
        "a" * 200_000,
        "😀👨‍👩‍👧" * 20_000,
        "<|end|>" * 50_000,
        "\u0301" * 100_000,
        "\x00\u2028\u202e\ufeff" * 1000,
    ],
)
async def test_awkward_text_is_only_text(gateway: Any, engine: Any, prompt: str) -> None:
    begin = time.monotonic()
    answer = await gateway.stub.Tokenize(pb.TokenizeRequest(text=prompt))
    assert time.monotonic() - begin < 10
    assert not {0, 1, 2, 3, 4, 5}.intersection(answer.token_ids[1:])
    back = await gateway.stub.Detokenize(pb.DetokenizeRequest(token_ids=answer.token_ids))
    assert back.text == prompt


async def test_a_prompt_of_the_context_less_one_is_taken(gateway: Any) -> None:
    responses = await drain(gateway.stub.Generate(ids(*[300] * 1023)))
    assert responses[-1].finish.usage.completion_tokens == 1


@pytest.mark.parametrize("timeout_s", [0.0, 1e-6, 0.001, -1.0])
async def test_a_deadline_that_has_passed(gateway: Any, engine: Any, timeout_s: float) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drain(gateway.stub.Generate(text(), timeout=timeout_s))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_keys_guard_every_method(start_engine: Any, start_gateway: Any) -> None:
    gateway = await start_gateway(
        await start_engine(), authenticator=Authenticator({"a": hash_key("key-a"), "b": hash_key("key-b")})
    )
    a = (("authorization", "Bearer key-a"),)
    b = (("authorization", "Bearer key-b"),)
    for metadata in (None, (("authorization", "Bearer no"),), (*a, *a)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    calls = [
        gateway.stub.Generate(text(request_id="same"), metadata=key) for key in (a, b)
    ]  # ids belong to their key
    for call in calls:
        async for response in call:
            if response.HasField("delta"):
                break
    await gateway.stub.Cancel(pb.CancelRequest(request_id="same"), metadata=a)
    assert (await drain(calls[0]))[-1].finish.reason == gen.FINISH_REASON_CANCELLED
    assert not calls[1].done()
    calls[1].cancel()


async def test_a_token_that_the_model_lacks(start_engine: Any, start_gateway: Any) -> None:
    engine = await start_engine()
    engine.info.vocab_size = 200
    gateway = await start_gateway(engine)
    error = await refused(gateway, text("Once upon a time"))
    assert error.code() == INVALID
    assert error_from_call(error).field_violations[0][0] == "text"
    assert not engine.submits
