"""Whose a session is, who has it now, what a turn leaves in it, when it is gone: no gateway, no engine."""

from __future__ import annotations

import asyncio
import sqlite3
from types import SimpleNamespace

import grpc
import pytest

from services.gateway.sessions.database import SessionLimits
from services.gateway.sessions.sessions import Sessions
from services.gateway.sessions.store import SessionStore
from services.gateway.sessions.turn import tokens_to_keep
from weft.rpc.errors import StatusError
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb

INFO = engine_pb.GetInfoResponse(
    model_name="demo",
    artifact_version="v1",
    artifact_digest="sha256:1",
    vocab_size=4096,
    max_model_len=1024,
    eos_token_ids=[1],
)


class Clock:
    def __init__(self):
        self.ms = 1_000_000

    def __call__(self):
        return self.ms


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def sessions(tmp_path, clock):
    limits = SessionLimits(ttl_s=10.0, max_sessions=6, max_sessions_per_key=4, max_tokens=40)
    sessions = Sessions(SessionStore(tmp_path / "sessions.db", limits), now_ms=clock)
    yield sessions
    assert sessions.num_live == 0
    await sessions.close()


def ask(*ids, session_id="s", **fields):
    return pb.GenerateRequest(session_id=session_id, token_ids=pb.TokenIds(ids=ids), **fields)


def refused(code, reason=None):
    def check(error):
        return error.code.name == code and (reason is None or error.reason == reason)

    class Refused:
        def __enter__(self):
            self.raises = pytest.raises(StatusError)
            self.caught = self.raises.__enter__()
            return self.caught

        def __exit__(self, *exception):
            swallowed = self.raises.__exit__(*exception)
            assert check(self.caught.value), (self.caught.value.code, self.caught.value.reason)
            return swallowed

    return Refused()


async def run_turn(sessions, request, output, owner=None):
    turn = await sessions.begin(request, owner)
    prompt = await turn.prompt(request, None, INFO)
    turn.close(output)
    await turn.saved()
    return prompt


async def test_turns_follow_each_other_to_the_token(sessions):
    await sessions.create(None, "s", INFO)
    assert await run_turn(sessions, ask(5, 6), [7, 1]) == [5, 6]
    assert await run_turn(sessions, ask(8), [9]) == [5, 6, 7, 1, 8]
    session, token_ids = await sessions.get(None, "s")
    assert (token_ids, session.num_turns, session.num_tokens) == ([5, 6, 7, 1, 8, 9], 2, 6)


async def test_no_token_no_turn(sessions):
    await sessions.create(None, "s", INFO)
    assert await run_turn(sessions, ask(5, 6), []) == [5, 6]
    turn = await sessions.begin(ask(5, 6), None)
    turn.close([])  # Before its prompt was made.
    turn.close([3])
    assert (await sessions.get(None, "s"))[1] == []


async def test_one_turn_at_a_time_and_the_next_waits_only_for_the_disk(sessions):
    await sessions.create(None, "s", INFO)
    turn = await sessions.begin(ask(5), None)
    for _ in range(2):
        with refused("ABORTED", "SESSION_BUSY"):
            await sessions.begin(ask(6), None)
    with refused("ABORTED", "SESSION_BUSY"):
        await sessions.delete(None, "s")
    assert (await sessions.get(None, "s"))[1] == []
    await turn.prompt(ask(5), None, INFO)
    turn.close([9])  # Nobody waits for it to be kept.
    next_turn, (_, token_ids) = await asyncio.gather(
        sessions.begin(ask(6), None), sessions.get(None, "s"), return_exceptions=True
    )
    assert token_ids == [5, 9]
    assert await next_turn.prompt(ask(6), None, INFO) == [5, 9, 6]
    next_turn.close([])


async def test_of_two_that_come_together_one_gets_the_session(sessions):
    await sessions.create(None, "s", INFO)
    found = await asyncio.gather(*(sessions.begin(ask(5), None) for _ in range(5)), return_exceptions=True)
    turns = [turn for turn in found if not isinstance(turn, BaseException)]
    assert len(turns) == 1
    assert {error.reason for error in found if isinstance(error, StatusError)} == {"SESSION_BUSY"}
    turns[0].close([])


async def test_sessions_belong_to_their_key(sessions):
    await sessions.create("ann", "s", INFO)
    for owner in ("bob", None, "an"):
        with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
            await sessions.get(owner, "s")
        with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
            await sessions.begin(ask(5), owner)
        with refused("NOT_FOUND", "SESSION_NOT_FOUND"):
            await sessions.delete(owner, "s")
    await sessions.create("bob", "s", INFO)
    await run_turn(sessions, ask(5), [6], owner="bob")
    assert (await sessions.get("ann", "s"))[1] == []
    await sessions.delete("bob", "s")
    await sessions.get("ann", "s")
    with refused("ALREADY_EXISTS", "SESSION_EXISTS"):
        await sessions.create("ann", "s", INFO)


async def test_a_deleted_session_is_gone(sessions):
    await sessions.create(None, "s", INFO)
    await run_turn(sessions, ask(5), [6])
    await sessions.delete(None, "s")
    with refused("NOT_FOUND"):
        await sessions.get(None, "s")
    await sessions.create(None, "s", INFO)
    assert (await sessions.get(None, "s"))[1] == []


async def test_a_session_expires_after_its_last_turn_but_not_under_a_live_one(sessions, clock):
    await sessions.create(None, "s", INFO)
    clock.ms += 9_999
    await run_turn(sessions, ask(5), [6])
    clock.ms += 9_999
    turn = await sessions.begin(ask(7), None)
    clock.ms += 100_000
    await sessions.get(None, "s")
    assert await sessions.store.run(lambda database: database.sweep(clock.ms, sessions._busy())) == 0
    await turn.prompt(ask(7), None, INFO)
    turn.close([8])
    await turn.saved()
    assert (await sessions.get(None, "s"))[1] == [5, 6, 7, 8]
    clock.ms += 10_001
    with refused("NOT_FOUND"):
        await sessions.get(None, "s")
    with refused("NOT_FOUND"):
        await sessions.begin(ask(5), None)
    assert await sessions.store.run(lambda database: database.sweep(clock.ms, ())) == 1


async def test_the_sweeper_sweeps(tmp_path, clock):
    sessions = Sessions(SessionStore(tmp_path / "s.db", SessionLimits(ttl_s=0.2)), now_ms=clock)
    await sessions.create(None, "s", INFO)
    sweeper = asyncio.create_task(sessions.sweep())
    clock.ms += 1000
    async with asyncio.timeout(10):
        while await sessions.store.run(lambda database: database.get("", "s")) is not None:
            pass
    sweeper.cancel()
    await asyncio.gather(sweeper, return_exceptions=True)
    await sessions.close()


async def test_limits(sessions, clock):
    for number in range(4):
        await sessions.create("ann", f"s{number}", INFO)
    with refused("RESOURCE_EXHAUSTED", "SESSION_LIMIT") as caught:
        await sessions.create("ann", "s4", INFO)
    assert caught.value.retry_after_s
    for number in range(2):
        await sessions.create("bob", f"s{number}", INFO)
    with refused("RESOURCE_EXHAUSTED", "SESSION_LIMIT"):
        await sessions.create("carl", "s", INFO)
    await run_turn(sessions, ask(*range(30), session_id="s0"), [1] * 10, owner="ann")
    with refused("RESOURCE_EXHAUSTED", "SESSION_LIMIT"):
        await sessions.begin(ask(1, session_id="s1"), "ann")
    await sessions.delete("ann", "s0")
    turn = await sessions.begin(ask(1, session_id="s1"), "ann")
    turn.close([])


@pytest.mark.parametrize("session_id", ["", "a/b", "x" * 129, "é", "a b", "'; DROP TABLE sessions; --"])
async def test_ids_that_are_none(sessions, session_id):
    if session_id:
        with refused("INVALID_ARGUMENT"):
            await sessions.create(None, session_id, INFO)
    with refused("INVALID_ARGUMENT"):
        await sessions.get(None, session_id)
    with refused("INVALID_ARGUMENT"):
        await sessions.delete(None, session_id)


async def test_an_id_may_be_left_to_the_server(sessions):
    one, other = [await sessions.create(None, "", INFO) for _ in range(2)]
    assert one.session_id != other.session_id
    await sessions.create(None, "x" * 128, INFO)


async def test_a_turn_has_one_sample_and_the_sessions_model(sessions):
    await sessions.create(None, "s", INFO)
    request = ask(5)
    request.sampling.n = 2
    with refused("INVALID_ARGUMENT") as caught:
        await sessions.begin(request, None)
    assert caught.value.field_violations[0][0] == "sampling.n"
    for model in ("other", "demo@v2", "demo@"):
        with refused("INVALID_ARGUMENT") as caught:
            await sessions.begin(ask(5, model=model), None)
        assert caught.value.field_violations[0][0] == "model"
    for model in ("demo", "demo@v1", ""):
        (await sessions.begin(ask(5, model=model), None)).close([])


async def test_a_session_keeps_to_its_artifact(sessions):
    class Served:
        def __init__(self, digest):
            self.info = engine_pb.GetInfoResponse(artifact_digest=digest)

    def answers(outcome):
        async def find_soon(model, deadline):
            assert (model, deadline) == ("demo@v1", 5.0)
            if isinstance(outcome, str):
                return Served(outcome)
            raise outcome

        return find_soon

    gone = StatusError(grpc.StatusCode.NOT_FOUND, "x", reason="MODEL_NOT_FOUND")
    away = StatusError(grpc.StatusCode.UNAVAILABLE, "x", retry_after_s=1.0, reason="NO_ENGINE")
    await sessions.create(None, "s", INFO)
    turn = await sessions.begin(ask(5), None)
    assert (await turn.find(answers("sha256:1"), 5.0)).info.artifact_digest == "sha256:1"
    for outcome in ("sha256:2", gone):
        with refused("FAILED_PRECONDITION", "SESSION_VERSION_GONE"):
            await turn.find(answers(outcome), 5.0)
    with refused("UNAVAILABLE", "NO_ENGINE"):
        await turn.find(answers(away), 5.0)
    turn.close([])


async def test_a_turn_that_cannot_be_kept_says_so_and_changes_nothing(sessions, monkeypatch):
    await sessions.create(None, "s", INFO)
    turn = await sessions.begin(ask(5), None)
    await turn.prompt(ask(5), None, INFO)

    def full_disk(*arguments):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sessions.store._database, "append", full_disk)
    turn.close([6])
    with refused("UNAVAILABLE", "SESSIONS_UNAVAILABLE"):
        await turn.saved()
    monkeypatch.undo()
    assert (await sessions.get(None, "s"))[1] == []
    assert await run_turn(sessions, ask(5), [6]) == [5]


async def test_a_turn_that_failed_may_be_gone_on_with(sessions):
    await sessions.create(None, "s", INFO)
    await run_turn(sessions, ask(2), [3])
    for first, second in (([7], [7, 8, 9]), ([], [7]), ([7], [7])):
        turn = await sessions.begin(ask(5), None)
        await turn.prompt(ask(5), None, INFO)
        before = (await sessions.get(None, "s"))[1]
        turn.close(first)
        again = await sessions.begin_again(turn)
        with refused("ABORTED", "SESSION_BUSY"):
            await sessions.begin(ask(6), None)
        again.close(second)
        session, token_ids = await sessions.get(None, "s")
        assert token_ids == [*before, 5, *second]
        assert session.num_tokens == len(token_ids)
    assert session.num_turns == 4
    assert await sessions.store.run(lambda database: database.num_tokens) == len(token_ids)


async def test_a_turn_that_failed_is_lost_once_the_session_goes_on(sessions):
    await sessions.create(None, "s", INFO)
    for output in ([7], []):
        turn = await sessions.begin(ask(5), None)
        await turn.prompt(ask(5), None, INFO)
        turn.close(output)
        await run_turn(sessions, ask(6), [8])
        with refused("FAILED_PRECONDITION", "SESSION_CHANGED"):
            await sessions.begin_again(turn)
    await sessions.delete(None, "s")
    with refused("NOT_FOUND"):
        await sessions.begin_again(turn)
    await sessions.create(None, "s", INFO)
    with refused("FAILED_PRECONDITION"):
        await sessions.begin_again(turn)


async def test_a_caller_that_goes_away_at_any_moment_leaves_the_session_free(sessions):
    await sessions.create(None, "s", INFO)
    for delay in range(12):
        task = asyncio.create_task(sessions.begin(ask(5), None))
        for _ in range(delay):
            await asyncio.sleep(0)
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        if not isinstance(outcome, BaseException):
            outcome.close([])
    assert sessions.num_live == 0
    assert await run_turn(sessions, ask(5), [6]) == [5]


async def test_closing_keeps_what_is_over(tmp_path):
    path = tmp_path / "sessions.db"
    sessions = Sessions(SessionStore(path, SessionLimits()))
    await sessions.create(None, "s", INFO)
    turn = await sessions.begin(ask(5), None)
    await turn.prompt(ask(5), None, INFO)
    turn.close([6])
    await sessions.close()
    sessions = Sessions(SessionStore(path, SessionLimits()))
    assert (await sessions.get(None, "s"))[1] == [5, 6]
    await sessions.close()


async def test_a_turn_is_gone_on_with_from_any_of_its_failures(sessions):
    """An older token may be used again: whatever its request knew, nothing is lost or counted twice."""
    await sessions.create(None, "s", INFO)
    first = await sessions.begin(ask(5), None)
    await first.prompt(ask(5), None, INFO)
    first.close([])
    second = await sessions.begin_again(first)
    second.close([7, 8])
    third = await sessions.begin_again(first)
    third.close([7, 8, 9, 10])
    fourth = await sessions.begin_again(second)
    fourth.close([7, 8, 9])  # Cut earlier than the one before it: what is kept stays.
    fifth = await sessions.begin_again(first)
    fifth.close([7, 8, 9, 10, 11])
    await fifth.saved()
    session, token_ids = await sessions.get(None, "s")
    assert token_ids == [5, 7, 8, 9, 10, 11]
    assert (session.num_turns, session.num_tokens) == (1, 6)
    assert await sessions.store.run(lambda database: database.num_tokens) == 6


async def test_a_call_that_goes_on_waits_for_the_one_before_it_to_leave(sessions):
    await sessions.create(None, "s", INFO)
    first = await sessions.begin(ask(5), None)
    await first.prompt(ask(5), None, INFO)
    first.close([7])
    second = await sessions.begin_again(first)
    third = asyncio.create_task(sessions.begin_again(first))
    await asyncio.sleep(0.05)
    assert not third.done()
    second.close([7, 8])
    (await third).close([7, 8, 9])
    assert (await sessions.get(None, "s"))[1] == [5, 7, 8, 9]


async def test_setting_the_clock_expires_nothing(tmp_path, monkeypatch):
    sessions = Sessions(SessionStore(tmp_path / "s.db", SessionLimits(ttl_s=60.0)))
    await sessions.create(None, "s", INFO)
    monkeypatch.setattr("time.time", lambda: 4e9)
    await sessions.get(None, "s")
    await sessions.close()


def test_what_of_an_output_is_kept():
    sample = SimpleNamespace(
        token_ids=[1, 2, 3, 4, 5, 6, 7],
        output=SimpleNamespace(num_tokens=5),  # the stop string was complete with the fifth
        journal=SimpleNamespace(most_sent=3),
        end=None,
    )
    assert tokens_to_keep(SimpleNamespace(samples=[sample])) == [1, 2, 3]
    sample.end = "its end"
    assert tokens_to_keep(SimpleNamespace(samples=[sample])) == [1, 2, 3, 4, 5]
