"""gRPC-level fuzz: messages of hostile values, spoiled bytes, HTTP/2 frames in any order; always the same.

Whatever comes, no status is UNKNOWN or INTERNAL of ours, the process lives, the probe gets the oracle's
tokens, and as much has ended as began. What the servers count decides: a client that still writes when its
call has ended makes an error of its own. The default run takes some seconds; the slow one tries many times
more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.hostile.hostile_stack import CODES, CONTEXT, VOCABULARY, Stack, token_request
from tests.hostile.raw_h2 import H2, PREFACE, call_headers, framed
from tests.services.engine.rpc.harness import Gateway, linked
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

pytestmark = pytest.mark.asyncio(loop_scope="module")
SEED_PROMPT = [311, 312, 313]
CALL_S = 3.0
BATCH = 8

# What a field is filled with: the values next to every limit, and those that mean something to some layer.
UINTS = st.sampled_from(
    [0, 1, 2, 3, 8, 9, 20, 21, CONTEXT - 1, CONTEXT, VOCABULARY - 1, VOCABULARY, 2**31, 2**32 - 1]
)
WIDE = st.sampled_from([0, 1, 10, 1000, 2**31, 2**32, 2**53, 2**63, 2**64 - 1])
INTS = st.sampled_from([0, 1, -1, 100, -100, 101, 2**31 - 1, -(2**31)])
FLOATS = st.sampled_from(
    [0.0, -0.0, 1.0, 0.5, 1.0000001, -1.0, 2.0, 100.0, 1e-38, 1e-45, 1e38, math.inf, -math.inf, math.nan]
)
TEXTS = st.sampled_from(
    ["", "a", "Once upon a time", "\x00", "\ufeff", "<|end|>", "é😀", "\u202e", "a" * 129, "x" * 5000,
     "../..", "demo", "demo@v1", "user", "system", "' OR 1=1 --", "{{ 1 }}", "%s%n", "\n"]
)  # fmt: skip
IDS = st.lists(st.sampled_from([0, 1, 300, 301, VOCABULARY - 1, VOCABULARY, 2**32 - 1]), max_size=6)
GOOD_IDS = st.lists(st.integers(300, 3000), min_size=1, max_size=6)


def maybe(values: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), values)


def message(kind: Any, **fields: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Messages of a kind; a None field is left unset."""

    def make(values: dict[str, Any]) -> Any:
        return kind(**{name: value for name, value in values.items() if value is not None})

    return st.fixed_dictionaries(fields).map(make)


SAMPLINGS = message(
    gen.SamplingParams,
    temperature=maybe(FLOATS), top_k=maybe(UINTS), top_p=maybe(FLOATS), min_p=maybe(FLOATS), seed=maybe(WIDE),
    repetition_penalty=maybe(FLOATS), presence_penalty=maybe(FLOATS), frequency_penalty=maybe(FLOATS),
    logit_bias=st.lists(message(gen.SamplingParams.LogitBias, token_id=UINTS, bias=FLOATS), max_size=2),
    stop_token_ids=maybe(IDS), min_tokens=maybe(UINTS), max_tokens=st.one_of(st.integers(1, 9), UINTS),
    ignore_eos=maybe(st.booleans()), n=maybe(UINTS), logprobs=maybe(UINTS),
)  # fmt: skip
# Mostly harmless, so that something runs.
MILD = st.builds(
    gen.SamplingParams, max_tokens=st.integers(1, 20), seed=st.integers(0, 99), ignore_eos=st.just(True)
)
SAMPLING = st.one_of(MILD, SAMPLINGS)
CHATS = message(
    pb.ChatPrompt, messages=st.lists(message(pb.ChatMessage, role=TEXTS, content=TEXTS), max_size=3)
)
PROMPTS = st.one_of(
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries({"chat": CHATS}),
    st.fixed_dictionaries({"token_ids": st.builds(pb.TokenIds, ids=st.one_of(GOOD_IDS, IDS))}),
    st.just({}),
)


def generate_request(prompt: dict[str, Any], rest: dict[str, Any]) -> pb.GenerateRequest:
    rest = {name: value for name, value in rest.items() if value is not None}
    return pb.GenerateRequest(**prompt, **rest)


GENERATES = st.builds(
    generate_request,
    PROMPTS,
    st.fixed_dictionaries(
        {
            "model": maybe(TEXTS), "sampling": SAMPLING, "stop": maybe(st.lists(TEXTS, max_size=2)),
            "request_id": maybe(TEXTS), "session_id": maybe(TEXTS), "resumable": maybe(st.booleans()),
            "resume_offset": maybe(WIDE), "resume_offsets": maybe(st.lists(WIDE, max_size=2)),
            "resume_token": maybe(TEXTS), "priority": maybe(INTS), "must_complete": maybe(st.booleans()),
            "cache_salt": maybe(TEXTS), "skip_special_tokens": maybe(st.booleans()),
        }
    ),
)  # fmt: skip
STREAM_IDS = st.sampled_from([0, 1, 1, 2, 2**64 - 1])
MULTIPLEXES = st.one_of(
    message(pb.MultiplexRequest, stream_id=STREAM_IDS, generate=GENERATES, budget_ms=maybe(WIDE)),
    message(
        pb.MultiplexRequest, stream_id=STREAM_IDS, cancel=st.just(pb.CancelStream()), budget_ms=maybe(WIDE)
    ),
    message(pb.MultiplexRequest, stream_id=STREAM_IDS),
)
SLOTS = st.sampled_from([0, 1, 1, 2**32 - 1])
COMMANDS = st.one_of(
    *(
        st.builds(lambda value, name=name: engine_pb.ConnectRequest(**{name: value}), values)
        for name, values in {
            "submit": message(
                engine_pb.Submit, slot=SLOTS, request_id=maybe(TEXTS),
                prompt_token_ids=st.one_of(GOOD_IDS, IDS), emitted_token_ids=maybe(IDS),
                sampling=SAMPLING, sample_index=maybe(UINTS), priority=maybe(INTS),
                budget_ms=maybe(WIDE), must_complete=maybe(st.booleans()), cache_salt=maybe(TEXTS),
                retain_seconds=maybe(UINTS),
            ),
            "cancel": message(engine_pb.Cancel, slot=SLOTS),
            "update": message(engine_pb.Update, slot=SLOTS, priority=maybe(INTS), budget_ms=maybe(WIDE)),
            "pause": message(engine_pb.Pause, slot=SLOTS),
            "resume": message(engine_pb.Resume, slot=SLOTS),
            "credit": message(engine_pb.FrameCredit, bytes=WIDE),
            "hello": message(engine_pb.GatewayHello, protocol_version=UINTS, gateway_id=maybe(TEXTS)),
        }.items()
    ),
    st.just(engine_pb.ConnectRequest()),
)  # fmt: skip


UNARIES = st.one_of(
    *(
        st.tuples(st.just(name), requests)
        for name, requests in {
            "Cancel": message(pb.CancelRequest, request_id=maybe(TEXTS)),
            "Tokenize": st.one_of(
                message(pb.TokenizeRequest, model=maybe(TEXTS), text=TEXTS),
                message(pb.TokenizeRequest, model=maybe(TEXTS), chat=CHATS),
            ),
            "Detokenize": message(
                pb.DetokenizeRequest,
                model=maybe(TEXTS),
                token_ids=IDS,
                skip_special_tokens=maybe(st.booleans()),
            ),
            "CreateSession": message(pb.CreateSessionRequest, model=maybe(TEXTS), session_id=maybe(TEXTS)),
            "GetSession": message(
                pb.GetSessionRequest, session_id=maybe(TEXTS), include_token_ids=maybe(st.booleans())
            ),
            "DeleteSession": message(pb.DeleteSessionRequest, session_id=maybe(TEXTS)),
        }.items()
    )
)


@st.composite
def spoiled(draw: Any, messages: SearchStrategy[Any]) -> bytes:
    """The bytes of a message with some changed, cut out, put in, or another's behind."""
    data = bytearray(draw(messages).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        what = draw(st.integers(0, 3))
        if what == 0 and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif what == 1:
            data[at:at] = draw(st.binary(max_size=6))
        elif what == 2:
            del data[at : at + draw(st.integers(1, 6))]
        else:
            data += draw(messages).SerializeToString()[:at]
    return bytes(data)


def fuzz(
    values: SearchStrategy[Any],
    act: Callable[[list[Any]], Coroutine[Any, Any, None]],
    num_examples: int,
) -> Awaitable[None]:
    """Try `num_examples` lists of values, in a thread: the test's own loop is what serves them."""
    loop = asyncio.get_running_loop()

    def run() -> None:
        @settings(
            max_examples=num_examples, derandomize=True, database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.lists(values, min_size=1, max_size=BATCH))
        def tried(batch: list[Any]) -> None:
            asyncio.run_coroutine_threadsafe(act(batch), loop).result(60)

        tried()

    return asyncio.to_thread(run)


async def checked(stack: Stack, values: Any, act: Any, num_examples: int) -> None:
    """Fuzz with the bystanders beside it. The event loop may be held by the fuzz's own client."""
    async with stack.watched(max_hold_s=None):

        async def one(batch: list[Any]) -> None:
            await act(batch)
            stack.check_codes()
            stack.check_bystanders()

        await fuzz(values, one, num_examples)


def check_status(code: Any) -> None:
    name = code.name if isinstance(code, grpc.StatusCode) else CODES[code]
    assert name not in ("UNKNOWN", "INTERNAL"), name


async def finished(call: Any) -> None:
    """Read a call to its end, or give it up after a while."""
    try:
        async with asyncio.timeout(CALL_S):
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        check_status(error.code())
    except TimeoutError:
        pass
    finally:
        call.cancel()


async def written(call: Any, batch: list[Any]) -> bool:
    """Write all of it. False when the call has ended before, and what the client reports is its own."""
    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
        for message in batch:
            await call.write(message)
        await call.done_writing()
        return True
    return False


def raw_call(channel: grpc.aio.Channel, path: str, data: list[bytes]) -> Any:
    return channel.stream_stream(path)(iter(data), timeout=2 * CALL_S)


async def messages_to_generate(stack: Stack, num_examples: int) -> None:
    async def act(batch: list[pb.GenerateRequest]) -> None:
        await asyncio.gather(*(finished(stack.stub.Generate(request)) for request in batch))

    await checked(stack, GENERATES, act, num_examples)


async def messages_to_multiplex(stack: Stack, num_examples: int) -> None:
    async def act(batch: list[pb.MultiplexRequest]) -> None:
        call = stack.stub.Multiplex()
        try:
            async with asyncio.timeout(CALL_S):
                if not await written(call, batch):
                    return
                while (response := await call.read()) is not grpc.aio.EOF:
                    if response.end.HasField("failure"):
                        check_status(response.end.failure.code)
        except grpc.aio.AioRpcError as error:
            check_status(error.code())
        except TimeoutError:
            pass
        finally:
            call.cancel()

    await checked(stack, MULTIPLEXES, act, num_examples)


async def messages_to_the_rest(stack: Stack, num_examples: int) -> None:
    async def one(name: str, request: Any) -> None:
        try:
            await getattr(stack.stub, name)(request, timeout=2 * CALL_S)
        except grpc.aio.AioRpcError as error:
            check_status(error.code())

    async def act(batch: list[tuple[str, Any]]) -> None:
        await asyncio.gather(*(one(name, request) for name, request in batch))

    await checked(stack, UNARIES, act, num_examples)


async def commands_to_the_engine(stack: Stack, num_examples: int) -> None:
    class Engine:
        stub = stack.engine_stub

    async def act(batch: list[engine_pb.ConnectRequest]) -> None:
        async with linked(Engine()) as gateway:  # type: ignore[arg-type]
            try:
                async with asyncio.timeout(CALL_S):
                    if await written(gateway.call, batch):
                        await until_end(gateway)
            except grpc.aio.AioRpcError as error:
                check_status(error.code())
            except TimeoutError:
                pass

    async def until_end(gateway: Gateway) -> None:
        while (response := await gateway.call.read()) is not grpc.aio.EOF:
            if response.HasField("rejected"):
                check_status(response.rejected.failure.code)
            for end in response.frame.finished:
                if end.HasField("failure"):
                    check_status(end.failure.code)

    await checked(stack, COMMANDS, act, num_examples)


async def spoiled_bytes(stack: Stack, num_examples: int) -> None:
    """On the method they were made for; a link gets a good hello first."""
    hello = engine_pb.ConnectRequest(
        hello=engine_pb.GatewayHello(protocol_version=1, initial_credit_bytes=1 << 20)
    ).SerializeToString()
    targets = {
        "/weft.v1.GatewayService/Generate": (stack.channel, GENERATES, []),
        "/weft.v1.GatewayService/Multiplex": (stack.channel, MULTIPLEXES, []),
        "/weft.v1.EngineService/Connect": (stack.engine_channel, COMMANDS, [hello]),
    }
    values = st.one_of(*(st.tuples(st.just(path), spoiled(made)) for path, (_, made, _) in targets.items()))

    async def act(batch: list[tuple[str, bytes]]) -> None:
        await asyncio.gather(
            *(finished(raw_call(targets[path][0], path, [*targets[path][2], data])) for path, data in batch)
        )

    await checked(stack, values, act, num_examples)


FRAME_KINDS = st.one_of(st.integers(0, 9), st.integers(0, 255))
FRAMES = st.tuples(
    FRAME_KINDS, st.integers(0, 255), st.sampled_from([0, 1, 1, 2, 3, 5, 2**31 - 1]), st.binary(max_size=40)
)
GOOD_CALL = ("call",)


async def frames(stack: Stack, num_examples: int) -> None:
    """After a good preface any frames, and good calls between them. The connection may end, no other does."""
    request = token_request(SEED_PROMPT, 3, 7).SerializeToString()

    async def act(batch: list[Any]) -> None:
        h2 = await H2.connect(stack.address, preface=PREFACE)
        for number, frame in enumerate(batch):
            if frame == GOOD_CALL:
                h2.begin(2 * number + 1, call_headers("/weft.v1.GatewayService/Generate"))
                h2.write(2 * number + 1, framed(request))
                continue
            kind, flags, stream_id, payload = frame
            head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big")
            h2.raw(head + payload)
        await h2.drain()
        await asyncio.sleep(0.005)
        await h2.close()

    await checked(stack, st.one_of(FRAMES, st.just(GOOD_CALL)), act, num_examples)


FUZZES = {
    "generate": (messages_to_generate, 100),
    "rest": (messages_to_the_rest, 100),
    "multiplex": (messages_to_multiplex, 100),
    "connect": (commands_to_the_engine, 100),
    "bytes": (spoiled_bytes, 100),
    "frames": (frames, 150),
}


@pytest.mark.parametrize("what", FUZZES)
async def test_fuzz(stack: Stack, what: str) -> None:
    act, num_examples = FUZZES[what]
    await act(stack, num_examples)


@pytest.mark.slow
@pytest.mark.parametrize("what", FUZZES)
async def test_fuzz_for_long(stack: Stack, what: str) -> None:
    act, num_examples = FUZZES[what]
    await act(stack, 20 * num_examples)
