"""Sessions over gRPC: each turn's tokens equal a stateless run over the same ids, and what a turn leaves
behind however it ends.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from typing import Any

import grpc
import pytest

from tools.mock_engine import MockEngine
from tools.mock_engine.oracle import expected_tokens
from weft.rpc.auth import Authenticator, hash_key
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

VOCABULARY = 4096


@pytest.fixture
async def mock(stack):
    engine = MockEngine(step_ms=1, num_blocks=256, block_size=16, max_model_len=512)
    await engine.start()
    stack.push_async_callback(engine.kill)
    return engine


@pytest.fixture
async def served(start_gateway, mock):
    return await start_gateway(mock)


class Conversation:
    """A client with a session: sends only what is new, remembers nothing but what came."""

    def __init__(self, gateway: Any, session_id: str = "s", metadata: Any = None) -> None:
        self.gateway, self.session_id, self.metadata = gateway, session_id, metadata

    async def create(self, model: str = "demo") -> pb.Session:
        request = pb.CreateSessionRequest(model=model, session_id=self.session_id)
        response = await self.gateway.stub.CreateSession(request, metadata=self.metadata, timeout=20)
        return response.session

    def call(self, ids=(), *, text=None, chat=None, timeout=30, stop=(), request_id="", **sampling) -> Any:
        sampling.setdefault("seed", 7)
        sampling.setdefault("max_tokens", 6)
        request = pb.GenerateRequest(
            session_id=self.session_id,
            stop=stop,
            request_id=request_id,
            sampling=gen.SamplingParams(**sampling),
        )
        if text is not None:
            request.text = text
        elif chat is not None:
            for role, content in chat:
                request.chat.messages.add(role=role, content=content)
        else:
            request.token_ids.ids.extend(ids)
        return self.gateway.stub.Generate(request, metadata=self.metadata, timeout=timeout)

    async def turn(self, *arguments: Any, **fields: Any) -> tuple[pb.Started, list[int], pb.Finish]:
        return await read(self.call(*arguments, **fields))

    async def get(self) -> pb.Session:
        request = pb.GetSessionRequest(session_id=self.session_id, include_token_ids=True)
        response = await self.gateway.stub.GetSession(request, metadata=self.metadata, timeout=20)
        return response.session

    async def ids(self) -> list[int]:
        return list((await self.get()).token_ids)


async def read(call: Any) -> tuple[pb.Started, list[int], pb.Finish]:
    """The rest of a call."""
    started, ids, finish = None, [], None
    while (response := await call.read()) is not grpc.aio.EOF:
        kind = response.WhichOneof("event")
        if kind == "started":
            started = response.started
        elif kind == "delta":
            ids += response.delta.token_ids
        else:
            finish = response.finish
    return started, ids, finish


async def first_tokens(call: Any, count: int = 1) -> list[int]:
    """Read until so many tokens have come."""
    ids: list[int] = []
    while len(ids) < count:
        response = await call.read()
        assert response is not grpc.aio.EOF
        ids += response.delta.token_ids
    return ids


class Refused:
    """The block ends with this status, and, if given, this reason."""

    def __init__(self, code: str, reason: str = "") -> None:
        self.code, self.reason = code, reason

    def __enter__(self) -> Refused:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert isinstance(error, grpc.aio.AioRpcError), error
        assert error.code().name == self.code, error
        details = dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
        assert self.reason.encode() in details, details
        self.error = error
        return True


async def talk(gateway: Any, session_id: str = "s", metadata: Any = None) -> Conversation:
    conversation = Conversation(gateway, session_id, metadata)
    await conversation.create()
    return conversation


async def test_turns_equal_a_stateless_run_and_find_their_blocks(served):
    talker = Conversation(served)
    session = await talker.create()
    assert (session.session_id, session.model, session.version) == ("s", "demo", "v1")
    history: list[int] = []
    for number in range(5):
        new = [400 + number] * (20 + number)
        started, ids, finish = await talker.turn(new, seed=number)
        history += new
        assert ids == expected_tokens(history, number, 0, 6)
        assert started.prompt_tokens == finish.usage.prompt_tokens == len(history)
        # All but the newest tokens were there; of a block that is not full all but its last are copied.
        assert finish.usage.cached_tokens == (len(history) - len(new) - 1 if number else 0)
        history += ids
        session = await talker.get()
        assert list(session.token_ids) == history
        assert (session.num_tokens, session.num_turns) == (len(history), number + 1)


async def test_the_end_of_a_call_says_that_the_turn_is_kept(served):
    talker = await talk(served)
    store = served.application.sessions.store
    gate = threading.Event()
    call = talker.call([400], max_tokens=40)
    ids = await first_tokens(call)
    busy = asyncio.create_task(store.run(lambda database: gate.wait(20)))
    finish = None
    while finish is None:
        response = await call.read()
        ids += response.delta.token_ids
        finish = response.finish if response.HasField("finish") else None
    end = asyncio.create_task(call.read())
    done, _ = await asyncio.wait([end], timeout=0.3)
    assert not done
    gate.set()
    assert await end is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert (await store.run(lambda database: database.load("", "s"))).token_ids == [400, *ids]
    await busy


async def test_a_turn_that_cannot_be_kept_ends_with_an_error(served, monkeypatch):
    talker = await talk(served)

    def full(*arguments):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(served.application.sessions.store._database, "append", full)
    with Refused("UNAVAILABLE", "SESSIONS_UNAVAILABLE"):
        await talker.turn([400])
    monkeypatch.undo()
    assert await talker.ids() == []
    await talker.turn([400])


async def test_metrics_of_sessions(served):
    talker = await talk(served)
    await talker.turn([400], max_tokens=5)
    page = served.application.metrics.text().decode()
    assert "weft_gateway_sessions 1.0" in page
    assert "weft_gateway_session_tokens 6.0" in page
    assert "weft_gateway_session_turns_live 0.0" in page


async def test_the_stateless_run_through_the_same_door_agrees(served):
    talker = await talk(served)
    await talker.turn([400] * 9, seed=1)
    kept = await talker.ids()
    _, ids, _ = await talker.turn([401] * 9, seed=2)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=kept + [401] * 9), sampling=gen.SamplingParams(seed=2, max_tokens=6)
    )
    assert (await read(served.stub.Generate(request)))[1] == ids


async def test_what_was_evicted_is_computed_again(stack, start_gateway):
    engine = MockEngine(step_ms=0, num_blocks=8, block_size=16, max_model_len=128)
    await engine.start()
    stack.push_async_callback(engine.kill)
    gateway = await start_gateway(engine, session_retain_seconds=0)
    talker = await talk(gateway)
    await talker.turn([400] * 30)
    history = await talker.ids()
    for number in range(8):
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[500 + number] * 60), sampling=gen.SamplingParams(max_tokens=2)
        )
        await read(gateway.stub.Generate(request))
    _, ids, finish = await talker.turn([401])
    assert ids == expected_tokens([*history, 401], 7, 0, 6)
    assert finish.usage.cached_tokens == 0


async def test_retained_blocks_outlive_others(stack, start_gateway):
    engine = MockEngine(step_ms=0, num_blocks=8, block_size=16, max_model_len=128)
    await engine.start()
    stack.push_async_callback(engine.kill)
    gateway = await start_gateway(engine)
    talker = await talk(gateway)
    await talker.turn([400] * 30)
    for number in range(8):
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[500 + number] * 60), sampling=gen.SamplingParams(max_tokens=2)
        )
        await read(gateway.stub.Generate(request))
    _, _, finish = await talker.turn([401])
    assert finish.usage.cached_tokens >= 32


async def test_text_has_one_begin_token(served):
    talker = await talk(served)
    _, first, _ = await talker.turn(text="Once upon a time")
    _, second, _ = await talker.turn(text=" there was")
    ids = await talker.ids()
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert ids[-6:] == second
    tokenize = served.stub.Tokenize
    one = list((await tokenize(pb.TokenizeRequest(text="Once upon a time"))).token_ids)
    assert ids == [
        *one,
        *first,
        *list((await tokenize(pb.TokenizeRequest(text=" there was"))).token_ids)[1:],
        *second,
    ]


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_chat_is_what_the_template_writes_for_all_of_it(gateway, engine, is_cut):
    """Cut or not: the end token is drawn, or the template writes it."""
    talker = await talk(gateway)
    conversation = []
    for number, answer in enumerate(["A loom, and a warp.", "Red thread, 1,024 times.", "é!"]):
        engine.say(answer)
        new = [("system", "Be brief.")] * (number == 0) + [("user", f"Question {number}<|end|>?")]
        await talker.turn(chat=new, max_tokens=len(engine.text_ids) if is_cut else 50)
        conversation += [*new, ("assistant", answer)]
        request = pb.TokenizeRequest()
        for role, content in conversation:
            request.chat.messages.add(role=role, content=content)
        whole = list((await gateway.stub.Tokenize(request)).token_ids)
        end_and_generation_prompt = 1 + is_cut
        assert whole[: len(whole) - end_and_generation_prompt] == await talker.ids()
    with Refused("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED"):
        await talker.turn(chat=[("user", "long " * 3000)])


async def test_a_stop_string_ends_a_turn_with_the_token_that_completed_it(gateway, engine):
    talker = await talk(gateway)
    engine.say("weave the red thread STOP and then more of it")
    engine.steps_per_frame = 40  # All of it comes at once, what is behind the stop string included.
    _, ids, finish = await talker.turn([400], max_tokens=30, stop=["STOP"])
    assert finish.stop_string == "STOP"
    assert "STOP" in engine.library.decode(ids)
    assert len(ids) == finish.usage.completion_tokens
    assert await talker.ids() == [400, *ids]


async def test_the_drawn_end_token_is_kept(gateway, engine):
    talker = await talk(gateway)
    engine.say("short")
    _, ids, finish = await talker.turn([400], max_tokens=30)
    assert ids[-1] == 1
    assert finish.reason == gen.FINISH_REASON_STOP
    assert await talker.ids() == [400, *ids]


async def test_a_cancelled_turn_keeps_what_was_delivered(gateway, engine):
    engine.step_s = 0.01
    talker = await talk(gateway)
    call = talker.call([400], max_tokens=500, request_id="r")
    ids = await first_tokens(call, 3)
    await gateway.stub.Cancel(pb.CancelRequest(request_id="r"))
    _, rest, finish = await read(call)
    assert finish.reason == gen.FINISH_REASON_CANCELLED
    assert await talker.ids() == [400, *ids, *rest]


async def test_a_deadline_keeps_what_was_delivered(gateway, engine):
    engine.step_s = 0.01
    talker = await talk(gateway)
    _, ids, finish = await talker.turn([400], max_tokens=900, timeout=1.5)
    assert finish.reason == gen.FINISH_REASON_DEADLINE
    assert await talker.ids() == [400, *ids]


async def test_a_client_that_goes_away_leaves_what_was_sent_to_it(served):
    talker = await talk(served)
    call = talker.call([400], max_tokens=400)
    ids = await first_tokens(call, 3)
    call.cancel()
    kept = await settled(talker)
    assert kept[: 1 + len(ids)] == [400, *ids]
    assert kept[1:] == expected_tokens([400], 7, 0, len(kept) - 1)
    assert len(kept) < 401
    _, more, _ = await talker.turn([401], seed=8)
    assert more == expected_tokens([*kept, 401], 8, 0, 6)


async def settled(talker: Conversation) -> list[int]:
    """The session's tokens once no turn is live."""
    sessions = talker.gateway.application.sessions
    async with asyncio.timeout(20):
        while sessions.num_live:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return await talker.ids()


async def test_a_failure_leaves_what_was_sent_and_without_a_token_nothing(gateway, engine):
    talker = await talk(gateway)
    engine.error_at = {"late": 3, "early": 0}
    call = talker.call([400], request_id="late")
    ids = []
    with Refused("INTERNAL"):
        while (response := await call.read()) is not grpc.aio.EOF:
            ids += response.delta.token_ids
    assert len(ids) == 3
    assert await talker.ids() == [400, *ids]
    with Refused("INTERNAL"):
        await talker.turn([401], request_id="early")
    session = await talker.get()
    assert (list(session.token_ids), session.num_turns) == ([400, *ids], 1)
    await talker.turn([401])


async def test_a_refused_turn_changes_nothing(gateway, engine):
    talker = await talk(gateway)
    await talker.turn([400] * 900)
    before = await talker.ids()
    with Refused("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED"):
        await talker.turn([401] * 200)
    with Refused("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED"):
        await talker.turn([401] * 10, max_tokens=200)
    for fields in ({"n": 2}, {"temperature": -1.0}, {"stop": [""]}):
        with Refused("INVALID_ARGUMENT"):
            await talker.turn([401], **fields)
    with Refused("INVALID_ARGUMENT"):
        await talker.turn([VOCABULARY])
    engine.reject = gen.Failure(code=9, message="larger than the cache")
    with Refused("FAILED_PRECONDITION"):
        await talker.turn([401])
    engine.reject = None
    assert await talker.ids() == before
    await talker.turn([401])


async def test_one_live_turn_and_the_next_one_at_once_after_it(served):
    talker = await talk(served)
    call = talker.call([400], max_tokens=300)
    await first_tokens(call)
    with Refused("ABORTED", "SESSION_BUSY"):
        await talker.turn([401])
    with Refused("ABORTED", "SESSION_BUSY"):
        await served.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
    assert await talker.ids() == []
    await read(call)
    for _ in range(20):
        await talker.turn([401], max_tokens=1)
    assert (await talker.get()).num_turns == 21


async def test_turns_over_multiplex(served):
    talker = await talk(served)
    call = served.stub.Multiplex()
    history: list[int] = []
    for number in range(4):
        generate = pb.GenerateRequest(
            session_id="s",
            token_ids=pb.TokenIds(ids=[400 + number]),
            sampling=gen.SamplingParams(seed=7, max_tokens=4),
        )
        await call.write(pb.MultiplexRequest(stream_id=number, generate=generate))
        ids: list[int] = []
        while not (response := await call.read()).HasField("end"):
            ids += response.response.delta.token_ids
        assert not response.end.HasField("failure")
        history.append(400 + number)
        assert ids == expected_tokens(history, 7, 0, 4)
        history += ids
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await talker.ids() == history


@pytest.mark.parametrize("is_resumable", [False, True])
async def test_a_lost_turn_is_taken_up_by_its_token(start_gateway, mock, is_resumable):
    gateway = await start_gateway(mock, engine_wait_seconds=0.2)
    talker = await talk(gateway)
    request = pb.GenerateRequest(
        session_id="s",
        request_id="r",
        resumable=is_resumable,
        token_ids=pb.TokenIds(ids=[400]),
        sampling=gen.SamplingParams(seed=7, max_tokens=300),
    )
    call = gateway.stub.Generate(request, timeout=60)
    ids = await first_tokens(call, 3)
    await mock.kill()
    with Refused("UNAVAILABLE", "resume_token") as refused:
        while (response := await call.read()) is not grpc.aio.EOF:
            ids += response.delta.token_ids
    assert await talker.ids() == [400, *ids]
    token = dict(refused.error.trailing_metadata())["x-resume-token"]
    assert gateway.application.sessions.num_live == 0
    await mock.start()
    async with asyncio.timeout(20):
        while not gateway.application.router.is_ready:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    rest = (await read(gateway.stub.Generate(pb.GenerateRequest(resume_token=token))))[1]
    assert ids + rest == expected_tokens([400], 7, 0, 300)
    session = await talker.get()
    assert list(session.token_ids) == [400, *ids, *rest]
    assert (session.num_turns, session.num_tokens) == (1, 301)


async def test_a_lost_turn_cannot_be_taken_up_once_the_session_went_on(stack, start_gateway, mock):
    gateway = await start_gateway(mock, engine_wait_seconds=0.2)
    talker = await talk(gateway)
    call = talker.call([400], max_tokens=300)
    await first_tokens(call, 3)
    await mock.kill()
    with Refused("UNAVAILABLE", "resume_token") as refused:
        await read(call)
    token = dict(refused.error.trailing_metadata())["x-resume-token"]
    await mock.start()
    async with asyncio.timeout(20):
        while not gateway.application.router.is_ready:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await talker.turn([401])
    with Refused("FAILED_PRECONDITION", "SESSION_CHANGED"):
        await read(gateway.stub.Generate(pb.GenerateRequest(resume_token=token)))


async def test_a_resumable_turn_is_kept_whole_whoever_reads_it(served):
    talker = await talk(served)
    request = pb.GenerateRequest(
        session_id="s",
        request_id="r",
        resumable=True,
        token_ids=pb.TokenIds(ids=[400]),
        sampling=gen.SamplingParams(seed=7, max_tokens=300),
    )
    call = served.stub.Generate(request)
    await first_tokens(call, 3)
    call.cancel()
    with Refused("ABORTED", "SESSION_BUSY"):
        await talker.turn([401])
    expected = expected_tokens([400], 7, 0, 300)
    assert (await read(served.stub.Generate(request)))[1] == expected
    assert await talker.ids() == [400, *expected]
    # Read once more: nothing is added.
    request.resume_offset = 0
    assert (await read(served.stub.Generate(request)))[1] == expected
    assert await talker.ids() == [400, *expected]
    await talker.turn([401])


async def test_a_resumable_turn_that_nobody_comes_back_for(start_gateway, mock):
    gateway = await start_gateway(mock)
    talker = await talk(gateway)
    request = pb.GenerateRequest(
        session_id="s",
        request_id="r",
        resumable=True,
        token_ids=pb.TokenIds(ids=[400]),
        sampling=gen.SamplingParams(seed=7, max_tokens=200),
    )
    call = gateway.stub.Generate(request)
    await first_tokens(call, 3)
    call.cancel()
    # It came to its end alone, and may still be read: all of it is in the session.
    assert await settled(talker) == [400, *expected_tokens([400], 7, 0, 200)]


async def test_sessions_are_their_keys(start_gateway, mock):
    authenticator = Authenticator({name: hash_key(name * 9) for name in ("ann", "bob")})
    gateway = await start_gateway(mock, authenticator=authenticator)
    ann, bob = ([("x-api-key", name * 9)] for name in ("ann", "bob"))
    talker = await talk(gateway, metadata=ann)
    await talker.turn([400])
    stranger = Conversation(gateway, metadata=bob)
    for attempt in (
        lambda: stranger.get(),
        lambda: stranger.turn([400]),
        lambda: gateway.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"), metadata=bob),
    ):
        with Refused("NOT_FOUND", "SESSION_NOT_FOUND"):
            await attempt()
    await stranger.create()
    with Refused("ALREADY_EXISTS", "SESSION_EXISTS"):
        await talker.create()
    await gateway.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"), metadata=bob)
    assert (await talker.get()).num_turns == 1
    with Refused("UNAUTHENTICATED"):
        await Conversation(gateway).get()


@pytest.mark.parametrize(
    ("request_of", "code"),
    [
        (lambda: ("CreateSession", pb.CreateSessionRequest(model="none")), "NOT_FOUND"),
        (lambda: ("CreateSession", pb.CreateSessionRequest(session_id="a b")), "INVALID_ARGUMENT"),
        (lambda: ("GetSession", pb.GetSessionRequest()), "INVALID_ARGUMENT"),
        (lambda: ("GetSession", pb.GetSessionRequest(session_id="nobody")), "NOT_FOUND"),
        (lambda: ("DeleteSession", pb.DeleteSessionRequest()), "INVALID_ARGUMENT"),
        (lambda: ("DeleteSession", pb.DeleteSessionRequest(session_id="nobody")), "NOT_FOUND"),
        (lambda: ("DeleteSession", pb.DeleteSessionRequest.FromString(b"\x7a\x01x")), "INVALID_ARGUMENT"),
    ],
)
async def test_bad_requests(served, request_of, code):
    name, request = request_of()
    with Refused(code):
        await getattr(served.stub, name)(request)


async def stop(gateway: Any) -> None:
    await gateway.server.stop(0.2)
    await gateway.application.close()


async def test_with_a_file_a_session_outlives_the_gateway(start_gateway, mock, tmp_path):
    path = tmp_path / "sessions.db"
    gateway = await start_gateway(mock, sessions=path)
    talker = await talk(gateway)
    await talker.turn([400])
    before = await talker.ids()
    await stop(gateway)
    talker.gateway = await start_gateway(mock, sessions=path)
    assert await talker.ids() == before
    _, ids, _ = await talker.turn([401])
    assert ids == expected_tokens([*before, 401], 7, 0, 6)
    await stop(talker.gateway)
    talker.gateway = await start_gateway(mock)
    with Refused("NOT_FOUND"):
        await talker.get()


async def test_a_session_whose_version_is_gone_is_refused(stack, start_gateway, mock, tmp_path):
    path = tmp_path / "sessions.db"
    gateway = await start_gateway(mock, sessions=path)
    talker = await talk(gateway)
    await talker.turn([400])
    await stop(gateway)
    for fields in ({"version": "v2", "digest": "sha256:2"}, {"digest": "sha256:2"}):
        engine = MockEngine(step_ms=1, **fields)
        await engine.start()
        stack.push_async_callback(engine.kill)
        talker.gateway = await start_gateway(engine, sessions=path)
        with Refused("FAILED_PRECONDITION", "SESSION_VERSION_GONE"):
            await talker.turn([401])
        assert (await talker.get()).num_turns == 1
        await stop(talker.gateway)


async def test_a_turn_waits_for_an_engine_that_was_lost_a_moment_ago(start_gateway, mock):
    gateway = await start_gateway(mock)
    talker = await talk(gateway)
    await talker.turn([400])
    before = await talker.ids()
    await mock.kill()
    turn = asyncio.create_task(talker.turn([401]))
    await asyncio.sleep(0.3)
    await mock.start()
    _, ids, finish = await turn
    assert ids == expected_tokens([*before, 401], 7, 0, 6)
    assert finish.usage.cached_tokens == 0


async def test_a_session_of_an_artifact_without_a_version(stack, start_gateway):
    for version in ("", "v2"):
        engine = MockEngine(step_ms=1, version=version, digest=f"sha256:{version}")
        await engine.start()
        stack.push_async_callback(engine.kill)
        if not version:
            plain = engine
    gateway = await start_gateway(plain, engine)
    async with asyncio.timeout(20):
        while len(gateway.application.router.served()) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    for number in range(8):
        talker = await talk(gateway, f"s{number}", None)
        version = (await talker.get()).version
        for _ in range(3):
            started, _, _ = await talker.turn([400])
            assert started.version == version
