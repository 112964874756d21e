"""Requests that are taken up again: by their id while they live or are kept, by a token after an error."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.mock_engine import MockEngine
from tools.mock_engine.oracle import logprob
from weft.rpc.auth import Authenticator
from weft.rpc.errors import error_from_call
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

CODE = grpc.StatusCode
NUMBERS = itertools.count()


class Follower:
    """A client as the documentation describes it: it keeps text, tokens and where it may go on."""

    def __init__(self, num_samples: int = 1) -> None:
        self.texts = [""] * num_samples
        self.ids: list[list[int]] = [[] for _ in range(num_samples)]
        self.offsets = [0] * num_samples
        self.finishes: list[Any] = [None] * num_samples
        self.logprobs: list[list[int]] = [[] for _ in range(num_samples)]
        self.started: Any = None
        self._counts = [0] * num_samples

    @property
    def is_done(self) -> bool:
        return all(finish is not None for finish in self.finishes)

    def take(self, response: pb.GenerateResponse) -> None:
        kind = response.WhichOneof("event")
        if kind == "started":
            assert self.started is None or self.started == response.started
            self.started = response.started
        elif kind == "delta":
            delta = response.delta
            index = delta.sample_index
            assert self.finishes[index] is None
            self.texts[index] += delta.text
            self.ids[index] += delta.token_ids
            self.logprobs[index] += [entry.chosen.token_id for entry in delta.logprobs]
            assert len(self.texts[index].encode()) == delta.next_offset
            if delta.next_offset > self.offsets[index]:
                self.offsets[index], self._counts[index] = delta.next_offset, len(self.ids[index])
        else:
            finish = response.finish
            assert self.finishes[finish.sample_index] is None
            self.finishes[finish.sample_index] = finish

    def again(self) -> None:
        """Forget what a resume brings again: tokens behind the last text, and ends."""
        for index, count in enumerate(self._counts):
            del self.ids[index][count:]
            del self.logprobs[index][count:]
            self.finishes[index] = None

    def resume(self, request: pb.GenerateRequest) -> pb.GenerateRequest:
        """The request that goes on."""
        self.again()
        again = pb.GenerateRequest()
        again.CopyFrom(request)
        if len(self.offsets) == 1:
            again.resume_offset = self.offsets[0]
        else:
            again.resume_offsets.extend(self.offsets)
        return again

    def outcome(self) -> list[tuple[Any, ...]]:
        return [
            (text, ids, finish.reason, finish.stop_string, finish.usage)
            for text, ids, finish in zip(self.texts, self.ids, self.finishes, strict=True)
        ]


def ask(text: str = "Once", *, request_id: str = "r", stop: Any = (), **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text=text,
        request_id=request_id,
        resumable=True,
        stop=stop,
        sampling=gen.SamplingParams(**{"seed": 5, "max_tokens": 60, **sampling}),
    )


async def read(call: Any, follower: Follower, num_events: int | None = None) -> None:
    """Read so many events, or all, and leave."""
    try:
        while num_events is None or num_events > 0:
            response = await call.read()
            if response is grpc.aio.EOF:
                return
            follower.take(response)
            if num_events is not None:
                num_events -= 1
    finally:
        call.cancel()


async def whole(gateway: Any, request: pb.GenerateRequest) -> Follower:
    """The same request, undisturbed."""
    plain = pb.GenerateRequest()
    plain.CopyFrom(request)
    plain.ClearField("resumable")
    plain.request_id = ""
    follower = Follower(max(1, request.sampling.n))
    await read(gateway.stub.Generate(plain), follower)
    return follower


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call, Follower(8))
    return caught.value


def core(gateway: Any) -> Any:
    return gateway.application.gateway


async def quiet(gateway: Any, settle: Any) -> None:
    await settle(lambda: core(gateway).num_live == 0)


async def test_a_disconnected_request_runs_on_and_is_taken_up(gateway: Any, engine: Any, settle: Any) -> None:
    request = ask()
    expected = await whole(gateway, request)
    follower = Follower()
    await read(gateway.stub.Generate(request), follower, 6)
    assert 0 < len(follower.ids[0]) < 60
    await settle(lambda: not engine.slots)  # it ran to its end with nobody there
    await quiet(gateway, settle)
    assert len(core(gateway).attendance.remnants) == 1
    await read(gateway.stub.Generate(follower.resume(request)), follower)
    assert follower.outcome() == expected.outcome()
    # The outcome stays: the same call once more, from anywhere.
    again = Follower()
    await read(gateway.stub.Generate(request), again)
    assert again.outcome() == expected.outcome()
    assert again.started == follower.started
    assert len(engine.submits) == 2


async def test_a_running_request_is_attached_to(gateway: Any, engine: Any, settle: Any) -> None:
    engine.step_s = 0.02
    request = ask(n=3, logprobs=1)
    follower = Follower(3)
    await read(gateway.stub.Generate(request), follower, 9)
    await settle(lambda: len(core(gateway).attendance.retention) == 1)
    assert len(engine.slots) == 3, "no slot was given up"
    drawn = max(len(slot.ids) for slot in engine.slots.values())
    await settle(lambda: all(len(slot.ids) >= drawn + 3 for slot in engine.slots.values()))
    await read(gateway.stub.Generate(follower.resume(request)), follower)
    assert core(gateway).counters.resumes == {"attached": 1}
    assert len(engine.submits) == 3
    assert follower.logprobs == follower.ids
    engine.step_s = 0.002
    assert follower.outcome() == (await whole(gateway, request)).outcome()


async def test_log_probabilities_stay_with_their_tokens(start_gateway: Any, settle: Any) -> None:
    """Through a life without a reader, and on into the running output."""
    async with MockEngine(step_ms=20) as engine:
        gateway = await start_gateway(engine)
        request = ask(logprobs=0, max_tokens=80)
        entries = []
        follower = Follower()
        await read(gateway.stub.Generate(request), follower, 6)
        (live,) = [entry.live for entry in core(gateway).entries]
        await settle(lambda: len(live.samples[0].token_ids) > len(follower.ids[0]) + 4)
        async for response in gateway.stub.Generate(follower.resume(request)):
            follower.take(response)
            entries += response.delta.logprobs
    assert len(entries) > 20
    assert all(entry.chosen.logprob == logprob(entry.chosen.token_id) for entry in entries)
    assert [entry.chosen.token_id for entry in entries] == follower.ids[0][-len(entries) :]


async def test_only_the_end_is_missing(gateway: Any, engine: Any, settle: Any) -> None:
    """Text that was held back to the last, and was sent, does not come again; what follows it does."""
    engine.say("It may be the start of STO")
    request = ask(stop=["STOP"])
    follower = Follower()
    call = gateway.stub.Generate(request)
    while follower.texts[0] != engine.text:
        follower.take(await call.read())
    call.cancel()
    await quiet(gateway, settle)
    follower.finishes[0] = None
    await read(gateway.stub.Generate(follower.resume(request)), follower)
    assert follower.outcome() == (await whole(gateway, request)).outcome()


async def test_without_resumable_a_disconnect_ends_it(gateway: Any, engine: Any, settle: Any) -> None:
    request = ask(max_tokens=500)
    request.resumable = False
    await read(gateway.stub.Generate(request), Follower(), 4)
    await settle(lambda: not engine.slots)
    assert engine.cancels
    assert not len(core(gateway).attendance.retention)


async def test_a_second_call_takes_over(gateway: Any, engine: Any, settle: Any) -> None:
    engine.step_s = 0.01
    request = ask(max_tokens=100)
    first = gateway.stub.Generate(request)
    follower = Follower()
    follower.take(await first.read())
    follower.take(await first.read())
    second = gateway.stub.Generate(follower.resume(request))
    other = Follower()
    other.take(await second.read())
    error = await refused(first)
    assert error.code() == CODE.ABORTED
    assert error_from_call(error).reason == "SUPERSEDED"
    assert "resume_token" not in error_from_call(error).metadata
    await read(second, follower)
    engine.step_s = 0.002
    assert follower.outcome() == (await whole(gateway, request)).outcome()


@pytest.mark.parametrize("is_running", [True, False])
async def test_offsets_that_were_never_sent(gateway: Any, engine: Any, settle: Any, is_running: bool) -> None:
    if is_running:
        engine.step_s = 0.05
    request = ask("Wo", max_tokens=20)
    follower = Follower()
    await read(gateway.stub.Generate(request), follower, 4)
    if not is_running:
        await quiet(gateway, settle)
    for offset in (1, follower.offsets[0] + 100_000, 2**64 - 1):
        again = follower.resume(request)
        again.resume_offset = offset
        error = await refused(gateway.stub.Generate(again))
        assert error.code() == CODE.OUT_OF_RANGE
        assert error_from_call(error).reason == "RESUME_OFFSET_UNKNOWN"
    again = ask("Wo", max_tokens=20)
    again.resume_offsets.extend([0, 0])
    assert (await refused(gateway.stub.Generate(again))).code() == CODE.INVALID_ARGUMENT
    other = ask("Other", max_tokens=20)
    error = await refused(gateway.stub.Generate(other))
    assert error.code() == CODE.ALREADY_EXISTS
    await read(gateway.stub.Generate(follower.resume(request)), follower)
    assert len(follower.ids[0]) == 20


async def test_fields_that_contradict(gateway: Any) -> None:
    token = "t" * 40
    bad = {
        "resumable": pb.GenerateRequest(text="x", resumable=True),
        "resume_offset": pb.GenerateRequest(text="x", resume_offset=0),
        "resume_offsets": pb.GenerateRequest(
            text="x", request_id="r", resumable=True, resume_offset=1, resume_offsets=[1]
        ),
        "request_id": pb.GenerateRequest(text="x", request_id="a b", resumable=True),
        "resume_token": pb.GenerateRequest(resume_token="t" * 200),
    }
    bad["resumable "] = pb.GenerateRequest(resume_token=token, resumable=True)
    bad["resume_offset "] = pb.GenerateRequest(resume_token=token, resume_offset=1)
    for field, request in bad.items():
        error = await refused(gateway.stub.Generate(request))
        assert error.code() == CODE.INVALID_ARGUMENT, field
        assert field.strip() in [f for f, _ in error_from_call(error).field_violations]
    for request in (
        pb.GenerateRequest(resume_token=token),
        pb.GenerateRequest(text="x", request_id="r", resumable=True, resume_offset=7),
        pb.GenerateRequest(text="x", request_id="r", resume_offset=0),
    ):
        error = await refused(gateway.stub.Generate(request))
        assert error.code() == CODE.NOT_FOUND
        assert error_from_call(error).reason == "REQUEST_NOT_FOUND"


async def test_ids_and_tokens_belong_to_a_key(start_gateway: Any, engine: Any, settle: Any) -> None:
    keys = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two")}
    gateway = await start_gateway(engine, authenticator=Authenticator(keys), engine_wait_seconds=0.0)
    one, two = ([("authorization", f"Bearer {name}")] for name in keys)
    request = ask()
    expected = Follower()
    await read(gateway.stub.Generate(request, metadata=two), expected)
    follower = Follower()
    await read(gateway.stub.Generate(request, metadata=one), follower, 4)
    await read(gateway.stub.Generate(follower.resume(request), metadata=one), follower)
    assert follower.outcome() == expected.outcome()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.Cancel(pb.CancelRequest(request_id="r"), metadata=two)
    assert caught.value.code() == CODE.NOT_FOUND
    (token,) = (
        r.token for r in core(gateway).attendance.remnants._by_token.values() if r.key == ("one", "r")
    )
    error = await refused(gateway.stub.Generate(pb.GenerateRequest(resume_token=token), metadata=two))
    assert error.code() == CODE.NOT_FOUND


async def test_coming_back_counts_as_a_request_of_the_second(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine(step_s=0.05)
    gateway = await start_gateway(engine, key_requests_per_second=0.5, key_max_streams=1)
    request = ask(max_tokens=900)
    follower = Follower()
    await read(gateway.stub.Generate(request), follower, 3)
    error = error_from_call(await refused(gateway.stub.Generate(follower.resume(request))))
    assert (error.code, error.reason) == (CODE.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert 0 < error.retry_after_s <= 2.0
    await asyncio.sleep(error.retry_after_s)
    # Its one stream is the request that it comes back to.
    await read(gateway.stub.Generate(follower.resume(request)), follower, 2)
    await gateway.stub.Cancel(pb.CancelRequest(request_id="r"))
    await quiet(gateway, settle)


async def cut(gateway: Any, engine: Any, request: pb.GenerateRequest, follower: Follower) -> Any:
    """Kill the engine in the middle of a request; the error that ends it."""
    engine.step_s = 0.01
    call = gateway.stub.Generate(request)
    for _ in range(8):
        follower.take(await call.read())
    await engine.die()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call, follower)
    return caught.value


@pytest.mark.parametrize("is_resumable", [True, False])
@pytest.mark.parametrize("has_body", [True, False])
async def test_a_token_goes_on_after_the_last_byte(
    start_engine: Any, start_gateway: Any, settle: Any, is_resumable: bool, has_body: bool
) -> None:
    engine = await start_engine(step_s=0.01)
    gateway = await start_gateway(engine, engine_wait_seconds=0.2)
    request = ask(n=2, max_tokens=80)
    request.resumable = is_resumable
    follower = Follower(2)
    error = error_from_call(await cut(gateway, engine, request, follower))
    assert (error.code, error.reason) == (CODE.UNAVAILABLE, "ENGINE_LOST")
    token = error.metadata["resume_token"]
    assert len(token) >= 32
    assert 0 < len(follower.ids[0]) < 80
    await quiet(gateway, settle)
    again = pb.GenerateRequest()
    if has_body:
        again.CopyFrom(request)
        again.resumable = False
    again.resume_token = token
    # Nothing to go on with yet: the error carries a token once more, and the old one stays good.
    error = error_from_call(await refused(gateway.stub.Generate(again)))
    assert error.code == CODE.UNAVAILABLE
    newer = error.metadata["resume_token"]
    if has_body:
        again.resume_token = newer
    engine.step_s = 0.001
    await engine.start(engine.address)
    await settle(lambda: gateway.link.is_up)
    await read(gateway.stub.Generate(again), follower)
    assert all(submit.emitted_token_ids for submit in engine.submits[-2:])
    expected = await whole(gateway, request)
    assert follower.outcome() == expected.outcome()
    if not is_resumable:
        # What came to its end is not kept.
        await settle(lambda: core(gateway).attendance.remnants.by_token(None, again.resume_token) is None)
    if has_body:
        other = pb.GenerateRequest(text="Another", resume_token=token)
        error = error_from_call(await refused(gateway.stub.Generate(other)))
        assert error.code in (CODE.ALREADY_EXISTS, CODE.NOT_FOUND)


async def test_the_trailer_and_the_event_carry_the_token(
    start_engine: Any, start_gateway: Any, settle: Any
) -> None:
    engine = await start_engine()
    gateway = await start_gateway(engine, engine_wait_seconds=0.0)
    multiplex = gateway.stub.Multiplex()
    request = ask(max_tokens=150)
    request.resumable = False
    request.request_id = "m"
    await multiplex.write(pb.MultiplexRequest(stream_id=1, generate=request))
    follower = Follower()
    while len(follower.ids[0]) < 10:
        follower.take((await multiplex.read()).response)
    error = await cut(gateway, engine, ask(max_tokens=150), Follower())
    trailers = dict(error.trailing_metadata())
    assert trailers["x-resume-token"] == error_from_call(error).metadata["resume_token"]
    while not (response := await multiplex.read()).HasField("end"):
        follower.take(response.response)
    failure = response.end.failure
    assert (failure.code, failure.reason) == (CODE.UNAVAILABLE.value[0], "ENGINE_LOST")
    engine.step_s = 0.001
    await engine.start(engine.address)
    await settle(lambda: gateway.link.is_up)
    again = pb.GenerateRequest(resume_token=failure.resume_token)
    await multiplex.write(pb.MultiplexRequest(stream_id=2, generate=again))
    while not (response := await multiplex.read()).HasField("end"):
        assert response.stream_id == 2
        follower.take(response.response)
    assert not response.end.HasField("failure")
    assert follower.outcome() == (await whole(gateway, request)).outcome()
    multiplex.cancel()


async def test_nothing_delivered_nothing_kept(start_engine: Any, start_gateway: Any) -> None:
    engine = await start_engine(is_hanging=False, step_s=30.0)
    gateway = await start_gateway(engine, engine_wait_seconds=0.0)
    call = gateway.stub.Generate(ask())
    await asyncio.sleep(0.05)
    await engine.die()
    error = error_from_call(await refused(call))
    assert error.code == CODE.UNAVAILABLE
    assert "resume_token" not in error.metadata
    assert not len(core(gateway).attendance.retention)


TEXT = "Übermut, naïve 日本語の文 and 🎉 emojis — STOP here, éé and more text follows 終わり."


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 3),
    stop=st.sampled_from([(), ("STOP",), ("more te", "日本語の文 x"), ("🎉 emo", "naï")]),
    steps=st.sampled_from([1, 3, 17]),
    is_text=st.booleans(),
    skips=st.booleans(),
)
async def test_any_disconnects_give_the_undisturbed_outcome(
    gateway: Any,
    engine: Any,
    seed: int,
    n: int,
    stop: tuple[str, ...],
    steps: int,
    is_text: bool,
    skips: bool,
) -> None:
    dice = random.Random(seed)
    engine.steps_per_frame, engine.text = steps, None
    if is_text:
        engine.say(TEXT)
    request = ask(
        f"{seed}", request_id=f"p{next(NUMBERS)}", n=n, stop=stop, seed=seed, max_tokens=70, logprobs=1
    )
    request.skip_special_tokens = skips
    expected = await whole(gateway, request)
    follower = Follower(n)
    call = gateway.stub.Generate(request)
    for _ in range(6):
        await read(call, follower, dice.randrange(12))
        await asyncio.sleep(dice.choice([0, 0, 0.005, 0.05]))
        if dice.random() < 0.15:
            follower = Follower(n)  # a client that lost its memory
        call = gateway.stub.Generate(follower.resume(request))
    await read(call, follower)
    assert follower.outcome() == expected.outcome()
    assert follower.logprobs == follower.ids
