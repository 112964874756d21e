"""Every limit at one below, at it, and one above, at every door that it holds at: gateway (gRPC, HTTP) and
engine. The limits are set by flags, so that the numbers are small and the flags are shown to do something.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import grpc
import httpx
import pytest

from services.engine.config import EngineConfig
from services.gateway.config import GatewayConfig
from tests.services.gateway.guard_process import DEMO
from tools.mock_engine import MockEngine
from weft.config import ConfigError, build_config
from weft.limits import DEFAULT_LIMITS, RequestLimits, limits_of
from weft.rpc.address import parse_address
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen
from weft.v1.engine_service_pb2_grpc import EngineServiceStub

# Of HTTP/2: kinds of frames, and one of the settings.
SETTINGS, GOAWAY, MAX_CONCURRENT_STREAMS = 4, 7, 3
TOKENS = gen.SamplingParams(max_tokens=1, seed=1)
SHARED = {"max_logprobs": 5, "max_logit_bias": 4, "max_stop_token_ids": 3}
SMALL = {
    **SHARED,
    "max_n": 3,
    "max_text_bytes": 200,
    "max_messages": 4,
    "max_stop_strings": 3,
    "max_stop_bytes": 10,
    "max_prompts": 3,
    "max_body_bytes": 4096,
    "max_header_bytes": 2048,
}


class Doors(NamedTuple):
    """A gateway and the engine behind it."""

    gateway: Any
    engine: EngineServiceStub
    http: httpx.AsyncClient


@pytest.fixture
async def mock(stack: Any) -> MockEngine:
    engine = MockEngine(step_ms=0.0, **SHARED)
    await stack.enter_async_context(engine)
    return engine


@pytest.fixture
async def doors(stack: Any, mock: MockEngine, start_gateway: Any) -> Doors:
    gateway = await start_gateway(mock, http=parse_address("127.0.0.1:0"), **SMALL)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(str(mock.address)))
    http = await stack.enter_async_context(httpx.AsyncClient(base_url=gateway.http_url, timeout=30))
    return Doors(gateway, EngineServiceStub(channel), http)


async def grpc_code(call: Any) -> str:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def via_grpc(doors: Doors, request: pb.GenerateRequest) -> str:
    return await grpc_code(doors.gateway.stub.Generate(request, timeout=30))


async def via_engine(doors: Doors, request: engine_pb.GenerateTokensRequest) -> str:
    return await grpc_code(doors.engine.GenerateTokens(request, timeout=30))


async def via_http(doors: Doors, path: str, body: dict[str, Any]) -> str:
    answer = await doors.http.post(path, json=body)
    if answer.status_code == 400:
        return "INVALID_ARGUMENT"
    return "OK" if answer.status_code == 200 else str(answer.status_code)


def generate(**fields: Any) -> pb.GenerateRequest:
    sampling = gen.SamplingParams()
    sampling.CopyFrom(TOKENS)
    sampling.MergeFrom(fields.pop("sampling", gen.SamplingParams()))
    if not {"text", "chat", "token_ids"} & set(fields):
        fields["text"] = "x"
    return pb.GenerateRequest(sampling=sampling, **fields)


def engine_request(sampling: gen.SamplingParams) -> engine_pb.GenerateTokensRequest:
    request = engine_pb.GenerateTokensRequest(prompt_token_ids=[300, 301], sampling=sampling)
    request.sampling.max_tokens = 1
    return request


def sampled(make: Callable[[int], gen.SamplingParams], body: Callable[[int], dict[str, Any]]) -> Any:
    """A limit of sampling holds at three doors."""
    return (
        lambda doors, k: via_grpc(doors, generate(sampling=make(k))),
        lambda doors, k: via_engine(doors, engine_request(make(k))),
        lambda doors, k: via_http(doors, "/v1/completions", {"prompt": "x", "max_tokens": 1, **body(k)}),
    )


def written(make: Callable[[int], pb.GenerateRequest], path: str, body: Callable[[int], Any]) -> Any:
    """A limit of text holds at two."""
    return (
        lambda doors, k: via_grpc(doors, make(k)),
        lambda doors, k: via_http(doors, path, {"max_tokens": 1, **body(k)}),
    )


def biases(k: int) -> Any:
    return [gen.SamplingParams.LogitBias(token_id=i, bias=1.0) for i in range(k)]


def chat(k: int, content: str = "x") -> pb.ChatPrompt:
    roles = ["user", "assistant"] * k
    return pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content=content) for role in roles[:k]])


def messages(k: int, content: str = "x") -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role in (["user", "assistant"] * k)[:k]]


CASES: dict[str, Any] = {
    "max_n": written(
        lambda k: generate(sampling=gen.SamplingParams(n=k)),
        "/v1/completions",
        lambda k: {"prompt": "x", "n": k},
    ),
    "max_logprobs": sampled(lambda k: gen.SamplingParams(logprobs=k), lambda k: {"logprobs": k}),
    "max_logit_bias": sampled(
        lambda k: gen.SamplingParams(logit_bias=biases(k)),
        lambda k: {"logit_bias": {str(i): 1 for i in range(k)}},
    ),
    "max_stop_token_ids": sampled(
        lambda k: gen.SamplingParams(stop_token_ids=range(500, 500 + k)),
        lambda k: {"stop_token_ids": list(range(500, 500 + k))},
    ),
    "max_text_bytes": written(
        lambda k: generate(text="x" * k), "/v1/completions", lambda k: {"prompt": "x" * k}
    ),
    # Bytes, not characters: an e with an accent is two of them.
    "max_text_bytes of several": written(
        lambda k: generate(text="é" * 99 + "x" * (k - 198)),
        "/v1/completions",
        lambda k: {"prompt": "é" * 99 + "x" * (k - 198)},
    ),
    "max_text_bytes of a chat": written(
        lambda k: generate(chat=chat(1, "x" * k)),
        "/v1/chat/completions",
        lambda k: {"messages": messages(1, "x" * k)},
    ),
    "max_messages": written(
        lambda k: generate(chat=chat(k)), "/v1/chat/completions", lambda k: {"messages": messages(k)}
    ),
    "max_stop_strings": written(
        lambda k: generate(stop=[f"stop{i}" for i in range(k)]),
        "/v1/completions",
        lambda k: {"prompt": "x", "stop": [f"stop{i}" for i in range(k)]},
    ),
    "max_stop_bytes": written(
        lambda k: generate(stop=["é" + "x" * (k - 2)]),
        "/v1/completions",
        lambda k: {"prompt": "x", "stop": "é" + "x" * (k - 2)},
    ),
    "max_prompts": (
        lambda doors, k: via_http(doors, "/v1/completions", {"prompt": ["x"] * k, "max_tokens": 1}),
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_a_limit_of_requests(name: str, doors: Doors) -> None:
    limit = SMALL[name.partition(" ")[0]]
    for number, door in enumerate(CASES[name]):
        found = [await door(doors, k) for k in (limit - 1, limit, limit + 1)]
        assert found == ["OK", "OK", "INVALID_ARGUMENT"], (name, number, found)


async def test_tokenize_is_limited_as_generate_is(doors: Doors) -> None:
    for k, is_fine in ((199, True), (200, True), (201, False)):
        for request in (
            pb.TokenizeRequest(text="x" * k),
            pb.TokenizeRequest(chat=chat(1, "x" * k)),
            pb.TokenizeRequest(chat=chat(4 + (k == 201))),
        ):
            call = doors.gateway.stub.Tokenize(request)
            assert (await call.code() is grpc.StatusCode.OK) == is_fine, (k, request)


@pytest.mark.parametrize("size", [4095, 4096, 4097])
async def test_the_size_of_a_body(doors: Doors, size: int) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    headers = {"content-type": "application/json"}
    answer = await doors.http.post("/v1/completions", content=body.ljust(size), headers=headers)
    assert answer.status_code == (200 if size <= 4096 else 413)

    async def pieces() -> AsyncIterator[bytes]:
        yield body
        yield b" " * (size - len(body))

    answer = await doors.http.post("/v1/completions", content=pieces(), headers=headers)
    assert answer.status_code == (200 if size <= 4096 else 413)


@pytest.mark.parametrize("is_split", [False, True])
async def test_the_size_of_headers(doors: Doors, is_split: bool) -> None:
    address = doors.gateway.application.http.address
    for size, status in ((2047, b"200"), (2048, b"200"), (2049, b"431")):
        start, end = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: ", b"\r\n\r\n"
        data = start + b"x" * (size - len(start) - len(end)) + end
        reader, writer = await asyncio.open_connection(address.host, address.port)
        if is_split:
            writer.write(data[:100])
            await writer.drain()
            await asyncio.sleep(0.05)
            data = data[100:]
        writer.write(data)
        async with asyncio.timeout(20):
            assert (await reader.readline()).split()[1] == status, size
        writer.close()


async def test_the_size_of_a_message(stack: Any, start_gateway: Any) -> None:
    size = 4096
    mock = await stack.enter_async_context(
        MockEngine(step_ms=0.0, max_message_bytes=size, max_model_len=8192)
    )
    gateway = await start_gateway(await start_plain_engine(stack), max_message_bytes=size)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(str(mock.address)))
    for k, code in ((size - 1, "OK"), (size, "OK"), (size + 1, "RESOURCE_EXHAUSTED")):
        request = generate()
        request.text = "x" * (k - request.ByteSize())  # its one x was counted, a longer length is not
        assert request.ByteSize() == k
        assert await grpc_code(gateway.stub.Generate(request, timeout=30)) == code, k
        direct = engine_request(gen.SamplingParams(seed=1))
        direct.prompt_token_ids.extend([100] * (k - direct.ByteSize() - 1))
        assert direct.ByteSize() == k
        assert await grpc_code(EngineServiceStub(channel).GenerateTokens(direct, timeout=30)) == code, k


async def start_plain_engine(stack: Any) -> MockEngine:
    engine = MockEngine(step_ms=0.0)
    await stack.enter_async_context(engine)
    return engine


async def test_the_size_of_metadata(stack: Any, start_gateway: Any) -> None:
    """The library counts its own headers, too: the edge moves byte for byte with the limit."""
    engine = await start_plain_engine(stack)
    edges = []
    for limit in (2048, 2049):
        gateway = await start_gateway(engine, max_metadata_bytes=limit)
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            call = gateway.stub.ListModels(pb.ListModelsRequest(), metadata=[("x-pad", "x" * middle)])
            code = await call.code()
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)
            low, high = (middle, high) if code is grpc.StatusCode.OK else (low, middle)
        edges.append(low)
    assert edges[1] == edges[0] + 1
    assert 1000 < edges[0] < 2048
    mock = await stack.enter_async_context(MockEngine(step_ms=0.0, max_metadata_bytes=2048))
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(str(mock.address)))
    for k, expected in ((1000, grpc.StatusCode.OK), (2048, grpc.StatusCode.RESOURCE_EXHAUSTED)):
        call = EngineServiceStub(channel).GetInfo(engine_pb.GetInfoRequest(), metadata=[("x-pad", "x" * k)])
        assert await call.code() is expected


async def test_the_number_of_connections(stack: Any, start_gateway: Any) -> None:
    limit = 4
    mock = await stack.enter_async_context(MockEngine(step_ms=0.0, max_connections=limit))
    gateway = await start_gateway(
        await start_plain_engine(stack), http=parse_address("127.0.0.1:0"), max_connections=limit
    )
    await gateway.channel.close()
    for target in (gateway.server.address, mock.address):
        outcomes = []
        for _ in range(limit + 1):
            channel = grpc.aio.insecure_channel(str(target), options=[("grpc.use_local_subchannel_pool", 1)])
            stack.push_async_callback(channel.close)
            # Health, as of any server: a connection is refused before it says what it is for.
            call = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20)
            outcomes.append((await call.code()).name)
        assert outcomes == ["OK"] * limit + ["UNAVAILABLE"], target
    address = gateway.application.http.address
    statuses = []
    writers = []
    for _ in range(limit + 1):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
        async with asyncio.timeout(20):
            statuses.append((await reader.readline()).split()[1])
    assert statuses == [b"200"] * limit + [b"503"]
    writers.pop(0).close()
    async with asyncio.timeout(20):
        while True:  # a place that is given back is free
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writers.append(writer)
            with contextlib.suppress(ConnectionError):
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            if b" 200 " in await reader.readline():
                break
            writer.close()
    for writer in writers:
        writer.close()


async def test_what_a_connection_is_told(stack: Any, start_gateway: Any) -> None:
    """The streams that a connection may have, in the server's settings; and its end when it has been idle."""
    gateway = await start_gateway(
        await start_plain_engine(stack), max_streams_per_connection=37, max_idle_seconds=1.0
    )
    reader, writer = await asyncio.open_connection(gateway.server.address.host, gateway.server.address.port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04\x00" + bytes(4))
    settings: dict[int, int] = {}
    kinds = []
    async with asyncio.timeout(30):
        while GOAWAY not in kinds:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kinds.append(head[3])
            if head[3] == SETTINGS and not head[4] & 1:
                settings |= dict(struct.iter_unpack("!HI", payload))
    writer.close()
    assert settings[MAX_CONCURRENT_STREAMS] == 37


async def test_the_time_of_a_request(stack: Any, start_gateway: Any, start_engine: Any) -> None:
    engine = await start_engine(step_s=0.05)
    gateway = await start_gateway(engine, max_request_seconds=1.0)
    request = generate()
    request.sampling.max_tokens = 1000
    call = gateway.stub.Generate(request)
    finishes = [response.finish async for response in call if response.HasField("finish")]
    assert finishes[0].reason == gen.FINISH_REASON_DEADLINE


FIELDS = [field.name for field in dataclasses.fields(RequestLimits)]


def flags(name: str, value: object) -> dict[str, str]:
    return {name: str(value)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_limit_is_a_flag_that_arrives(name: str) -> None:
    field = RequestLimits.__dataclass_fields__[name]
    low, high = field.metadata["weft.low"], field.metadata["weft.high"]
    kind = type(field.default)
    for config_class, rest in (
        (GatewayConfig, {"tokenizer": str(DEMO)}),
        (EngineConfig, {"source": str(DEMO)}),
    ):
        if not hasattr(config_class, name):
            assert config_class is EngineConfig
            continue
        for value in (kind(low), kind(high)):
            config = build_config(config_class, {**rest, **flags(name, value)})
            assert getattr(limits_of(config), name) == value
        for value in (kind(low) - 1, kind(high) + 1):
            with pytest.raises(ConfigError) as caught:
                build_config(config_class, {**rest, **flags(name, value)})
            assert caught.value.flag == "--" + name.replace("_", "-")


def test_the_usual_limits_are_the_promised_ones() -> None:
    """A change of a default is a change of what clients may rely on."""
    assert dataclasses.asdict(DEFAULT_LIMITS) == {
        "max_logprobs": 20,
        "max_logit_bias": 300,
        "max_stop_token_ids": 64,
        "max_n": 8,
        "max_text_bytes": 2 << 20,
        "max_messages": 1024,
        "max_stop_strings": 16,
        "max_stop_bytes": 256,
        "max_request_seconds": 1800.0,
        "max_message_bytes": 8 << 20,
        "max_metadata_bytes": 16 << 10,
        "max_streams_per_connection": 1000,
        "max_idle_seconds": 600.0,
        "max_connections": 4096,
        "max_body_bytes": 8 << 20,
        "max_header_bytes": 32 << 10,
        "max_prompts": 64,
    }
    assert build_config(EngineConfig, {"source": str(DEMO)}).max_message_bytes == 64 << 20
