"""GenerateTokens and the questions one may ask an engine, over a real channel."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from services.engine.core.errors import (
    DeadlineUnmet,
    DoesNotFit,
    Draining,
    DuplicateRequest,
    InternalFailure,
    InvalidRequest,
    QueueFull,
    RequestError,
)
from services.engine.loop import EngineUnavailable
from services.engine.rpc import convert
from services.engine.rpc.errors import status_error
from services.engine.runner.config import RunnerInfo
from tests.services.engine.rpc.harness import (
    VOCABULARY,
    eventually,
    expected,
    linked,
    running_engine,
    sampling,
    submit,
)
from weft.rpc.auth import Authenticator, hash_key
from weft.rpc.channel import open_channel
from weft.rpc.errors import error_from_call
from weft.rpc.server import Server
from weft.v1 import engine_service_pb2 as pb
from weft.v1 import generation_pb2
from weft.v1.engine_service_pb2_grpc import EngineServiceStub, add_EngineServiceServicer_to_server

PROMPT = [2, 7, 1, 8, 2, 8]


def request(max_tokens: int = 10, **fields) -> pb.GenerateTokensRequest:
    params = fields.pop("sampling", None) or sampling(max_tokens)
    return pb.GenerateTokensRequest(prompt_token_ids=PROMPT, sampling=params, **fields)


async def collect(call) -> tuple[list[int], list[pb.GenerateTokensResponse]]:
    tokens: list[int] = []
    responses = [response async for response in call]
    for response in responses:
        if response.token_ids:
            assert response.position == responses[0].position + len(tokens)
        tokens += response.token_ids
    return tokens, responses


async def fails_with(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    return error_from_call(caught.value)


async def test_tokens_then_the_end():
    async with running_engine() as engine:
        tokens, responses = await collect(engine.stub.GenerateTokens(request(40)))
        assert tokens == expected(PROMPT, 40)
        assert responses[0].seed == 1
        assert [response.HasField("seed") for response in responses] == [True] + [False] * (
            len(responses) - 1
        )
        assert [response.HasField("finished") for response in responses[:-1]] == [False] * (
            len(responses) - 1
        )
        end = responses[-1].finished
        assert end.reason == generation_pb2.FINISH_REASON_LENGTH
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (6, 40)


async def test_unset_fields_are_resolved():
    async with running_engine() as engine:
        bare = pb.GenerateTokensRequest(
            prompt_token_ids=PROMPT, sampling=generation_pb2.SamplingParams(ignore_eos=True)
        )
        tokens, responses = await collect(engine.stub.GenerateTokens(bare))
        assert len(tokens) == engine.info.max_model_len - len(PROMPT)
        assert tokens[:50] == expected(PROMPT, 50, seed=responses[0].seed)


async def test_resume_and_logprobs():
    whole = expected(PROMPT, 10)
    async with running_engine() as engine:
        call = engine.stub.GenerateTokens(
            request(sampling=sampling(10, logprobs=2), emitted_token_ids=whole[:4], sample_index=0)
        )
        tokens, responses = await collect(call)
        assert tokens == whole[4:]
        assert responses[0].position == 4
        entries = [entry for response in responses for entry in response.logprobs]
        assert len(entries) == 6
        assert all(list(entry.top_token_ids) == [0, 1] for entry in entries)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (pb.GenerateTokensRequest(), "prompt_token_ids"),
        (pb.GenerateTokensRequest(prompt_token_ids=[VOCABULARY]), "prompt_token_ids[0]"),
        (request(0), "sampling.max_tokens"),
        (request(2**31), "sampling.max_tokens"),
        (request(sampling=sampling(4, temperature=float("inf"))), "sampling.temperature"),
        (request(sampling=sampling(4, n=2)), "sampling.n"),
        (request(sampling=generation_pb2.SamplingParams(min_tokens=1_999)), "sampling.min_tokens"),
        (request(priority=-101), "priority"),
    ],
)
async def test_a_bad_request_is_an_invalid_argument(bad, field):
    async with running_engine() as engine:
        error = await fails_with(engine.stub.GenerateTokens(bad))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.field_violations[0][0] == field
        assert field in error.message


async def test_the_calls_deadline_steers():
    async with running_engine() as engine:
        engine.runner.step_s = 0.01
        tokens, responses = await collect(engine.stub.GenerateTokens(request(1_900), timeout=0.6))
        assert responses[-1].finished.reason == generation_pb2.FINISH_REASON_DEADLINE
        assert responses[-1].finished.usage.completion_tokens == len(tokens) > 5
        assert tokens == expected(PROMPT, len(tokens))


async def test_what_cannot_complete_in_time_is_refused_at_once():
    async with running_engine() as engine:
        engine.runner.step_s = 0.02
        await collect(engine.stub.GenerateTokens(request(10)))
        started = asyncio.get_running_loop().time()
        error = await fails_with(engine.stub.GenerateTokens(request(1_900, must_complete=True), timeout=2))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.reason == "DEADLINE_UNMET"
        assert asyncio.get_running_loop().time() - started < 1


async def test_no_token_before_the_deadline_is_deadline_exceeded():
    async with running_engine(max_batch_size=1) as engine, linked(engine) as gateway:
        engine.runner.step_s = 0.01
        await gateway.call.write(submit(0, PROMPT, 1_000))
        await gateway.read_until(lambda: gateway.tokens)
        error = await fails_with(engine.stub.GenerateTokens(request(5), timeout=0.3))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_caller_that_leaves_frees_the_sequence():
    async with running_engine() as engine:
        engine.runner.step_s = 0.005
        call = engine.stub.GenerateTokens(request(1_900))
        await call.read()
        assert engine.core.num_live == 1
        call.cancel()
        await eventually(lambda: engine.core.num_live == 0, within_s=1)


async def test_what_a_drain_ends_is_unavailable():
    async with running_engine() as engine:
        engine.runner.step_s = 0.01
        call = engine.stub.GenerateTokens(request(1_900))
        await anext(aiter(call))
        assert [r.live async for r in engine.stub.Drain(pb.DrainRequest(deadline_ms=0))][-1] == 0
        assert (await fails_with(call)).code is grpc.StatusCode.UNAVAILABLE
        late = await fails_with(engine.stub.GenerateTokens(request(5)))
        assert late.code is grpc.StatusCode.UNAVAILABLE
        assert late.retry_after_s


async def test_a_full_queue_and_a_small_cache():
    async with running_engine(num_blocks=4, max_queue_size=1, max_batch_size=1) as engine:
        engine.runner.step_s = 0.02
        error = await fails_with(engine.stub.GenerateTokens(request(100)))
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        calls = [engine.stub.GenerateTokens(request(20)) for _ in range(6)]
        outcomes = await asyncio.gather(*(collect(call) for call in calls), return_exceptions=True)
        refused = [error_from_call(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
        assert refused
        assert {error.code for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all(error.retry_after_s and error.retry_after_s > 0 for error in refused)


async def test_a_field_of_another_version_is_refused_not_ignored():
    unknown = b"\xf8\x3f\x01"  # Field 1023, a varint.
    outer, inner = request(), request()
    outer.MergeFromString(unknown)
    inner.sampling.MergeFromString(unknown)
    biased = request()
    biased.sampling.logit_bias.add(token_id=1, bias=1.0).MergeFromString(unknown)
    async with running_engine() as engine, linked(engine) as gateway:
        for bad, path in ((outer, "1023"), (inner, "sampling.1023"), (biased, "sampling.logit_bias.1023")):
            error = await fails_with(engine.stub.GenerateTokens(bad))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT
            assert [field for field, _ in error.field_violations] == [path]
        command = submit(0, PROMPT)
        command.submit.MergeFromString(unknown)
        await gateway.call.write(command)
        await gateway.read_until(lambda: gateway.rejected)
        assert gateway.rejected[0].field_violations[0].field == "1023"


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_what_is_switched_off_is_no_capability(has_prefix_cache):
    info = RunnerInfo(
        model_name="m", artifact_version="", artifact_digest="d", tokenizer_digest="", architecture="A",
        vocab_size=7, num_layers=1, max_model_len=8, num_blocks=2, block_size=16, kv_bytes_per_token=4,
        weight_bytes=9, dtype="float32", kv_dtype="float32", device="cpu", numerics_id="n",
        is_deterministic=True, num_threads=1, bos_token_id=3, eos_token_ids=(1, 2), crossover_rows=48,
        kernel_paths={"qkv": "int4pack"},
    )  # fmt: skip
    message = convert.info_response(
        info,
        max_batch_size=4,
        max_batched_tokens=5,
        max_queue_size=6,
        has_prefix_cache=has_prefix_cache,
        weft_version="1",
    )
    assert ("prefix_cache" in message.capabilities) is has_prefix_cache
    assert {"logprobs", "pause", "resume"} <= set(message.capabilities)
    unset = {field.name for field in message.DESCRIPTOR.fields} - {
        field.name for field, _ in message.ListFields()
    }
    assert unset == {"artifact_version", "tokenizer_digest"}
    assert dict(message.kernel_paths) == {"qkv": "int4pack", "linear_crossover": "48 rows"}


async def test_info_and_load():
    async with running_engine() as engine:
        assert await engine.stub.GetInfo(pb.GetInfoRequest()) == engine.info
        await collect(engine.stub.GenerateTokens(request(20)))
        await eventually(lambda: engine.loop.load().counters.ended == 1)
        load = await engine.stub.GetLoad(pb.GetLoadRequest())
        assert load.free_blocks + load.active_blocks + load.cached_blocks == engine.info.num_blocks
        assert (load.requests_begun, load.requests_ended) == (1, 1)
        assert (load.generation_tokens, load.prompt_tokens, load.peak_batch_size) == (20, 6, 1)
        assert (load.running, load.waiting, load.active_blocks, load.is_draining) == (0, 0, 0, False)


@pytest.mark.parametrize(
    ("error", "code", "has_retry"),
    [
        (InvalidRequest("a.b", "is bad"), "INVALID_ARGUMENT", False),
        (DoesNotFit("too large"), "FAILED_PRECONDITION", False),
        (QueueFull("full", 2.0), "RESOURCE_EXHAUSTED", True),
        (DuplicateRequest("there"), "ALREADY_EXISTS", False),
        (DeadlineUnmet("late"), "DEADLINE_EXCEEDED", False),
        (Draining("draining"), "UNAVAILABLE", True),
        (EngineUnavailable("gone"), "UNAVAILABLE", True),
        (InternalFailure("sample", RuntimeError("secret")), "INTERNAL", False),
        (RequestError("of no known kind"), "INTERNAL", False),
    ],
)
def test_every_row_of_the_table(error, code, has_retry):
    status = status_error(error)
    assert status.code.name == code
    assert (status.retry_after_s is not None) == has_retry
    assert bool(status.error_id) == (code == "INTERNAL")
    assert "secret" not in status.message
    if code == "INVALID_ARGUMENT":
        assert status.field_violations == (("a.b", "is bad"),)


METHODS = [
    ("weft.v1.EngineService", method.name)
    for method in pb.DESCRIPTOR.services_by_name["EngineService"].methods
] + [
    ("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"),
    ("weft.v1.EngineService", "NoSuchMethod"),
    ("grpc.health.v1.Health", "Check"),
    ("grpc.health.v1.Health", "Watch"),
]
CREDENTIALS = {
    "none": (),
    "wrong": (("authorization", "Bearer wrong"),),
    "empty": (("authorization", "Bearer "),),
    "basic": (("authorization", "Basic right"),),
    "twice": (("authorization", "Bearer right"), ("x-api-key", "right")),
    "long": (("x-api-key", "r" * 8_000),),
    "bearer": (("authorization", "bearer right"),),
    "header": (("x-api-key", "right"),),
}


@asynccontextmanager
async def guarded_server(engine):
    """A second server of an engine, which wants a key."""
    server = Server(("weft.v1.EngineService",), authenticator=Authenticator({"me": hash_key("right")}))
    add_EngineServiceServicer_to_server(engine.servicer, server.grpc)
    await server.start(engine.server.address._replace(port=0))
    server.set_serving()
    try:
        yield server
    finally:
        await server.stop(0)


@pytest.mark.parametrize("credential", CREDENTIALS)
async def test_every_method_wants_a_key_but_health(credential):
    is_right = credential in ("bearer", "header")
    async with running_engine() as engine, guarded_server(engine) as server:
        async with grpc.aio.insecure_channel(str(server.address)) as channel:
            for service, method in METHODS:
                is_open = is_right or service == "grpc.health.v1.Health"
                code = await code_of(channel, f"/{service}/{method}", CREDENTIALS[credential], is_open)
                assert (code is grpc.StatusCode.UNAUTHENTICATED) == (not is_open), (service, method)
                assert code is not grpc.StatusCode.UNKNOWN


async def code_of(channel, method, metadata, is_open):
    """How a call ends, or OK once it has answered. A message is sent only to a method that may read it: a
    write that meets a refusal makes the library say INTERNAL in place of the server's own status.
    """
    call = channel.stream_stream(method)(metadata=metadata, timeout=5)
    try:
        if is_open:
            await call.write(b"")
        if await call.read() is grpc.aio.EOF:
            return await call.code()
        return grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        call.cancel()


async def test_our_own_channel_carries_the_key_on_every_kind_of_call():
    async with running_engine() as engine, guarded_server(engine) as server:
        async with open_channel(str(server.address), "right") as channel:
            engine.stub = EngineServiceStub(channel)
            assert await engine.stub.GetInfo(pb.GetInfoRequest()) == engine.info
            tokens, _ = await collect(
                engine.stub.GenerateTokens(request(5), metadata=(("x-request-id", "a"),))
            )
            assert tokens == expected(PROMPT, 5)
            async with linked(engine) as gateway:
                await gateway.call.write(submit(0, PROMPT))
                await gateway.read_until(lambda: gateway.finished)
