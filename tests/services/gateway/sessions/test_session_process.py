"""The gateway as a process with a file of sessions: kill -9 leaves a session as it was before the turn, or
with the whole of it; a file that cannot be used is refused in one line.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess

import grpc
import pytest

from services.gateway.config import load
from tests.services.gateway.test_process import COMMAND, DEMO, ROOT, start_process
from tools.mock_engine import MockEngine
from tools.mock_engine.oracle import expected_tokens
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen

__all__ = ["start_process"]


def ask(ids, max_tokens):
    return pb.GenerateRequest(
        session_id="s",
        token_ids=pb.TokenIds(ids=ids),
        sampling=gen.SamplingParams(seed=7, max_tokens=max_tokens),
    )


async def kept(stub):
    request = pb.GetSessionRequest(session_id="s", include_token_ids=True)
    return list((await stub.GetSession(request, timeout=20)).session.token_ids)


async def read(call):
    """The tokens that came, and whether the call said that all is well."""
    ids = []
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            ids += response.delta.token_ids
        return ids, (await call.code()) is grpc.StatusCode.OK
    except grpc.aio.AioRpcError:
        return ids, False


async def test_kill_9_leaves_a_turn_whole_or_not_at_all(start_process, tmp_path):
    """Killed in the middle of a turn, or at any moment of many short ones."""
    rng = random.Random(9)
    async with MockEngine(step_ms=2, max_model_len=4096) as engine:
        flags = ["--listen", "127.0.0.1:0", "--engine", engine.address, "--tokenizer", DEMO]
        history = maybe = []
        for number in range(5):
            gateway = await start_process(*flags, "--sessions", tmp_path / "sessions.db")
            stub = await gateway.stub()
            await gateway.wait_for("serving")
            if number == 0:
                await stub.CreateSession(pb.CreateSessionRequest(session_id="s"))
            found = await kept(stub)
            # What was said to be kept is there; of the turn under way all, or nothing.
            assert found in (history, maybe)
            history = found
            if number in (1, 3):
                call = stub.Generate(ask([400], 1000))
                got = []
                while len(got) < 5:
                    got += (await call.read()).delta.token_ids
                gateway.process.kill()
                assert (await read(call))[1] is False
                maybe = history
            else:
                killer = asyncio.create_task(kill_after(gateway, rng.random() * 0.3))
                is_ok = True
                while is_ok:
                    maybe = [*history, 500, *expected_tokens([*history, 500], 7, 0, 2)]
                    got, is_ok = await read(stub.Generate(ask([500], 2)))
                    history = maybe if is_ok else history
                await killer
            await gateway.process.wait()
        assert history


async def kill_after(gateway, delay_s):
    await asyncio.sleep(delay_s)
    gateway.process.kill()
    await gateway.process.wait()


async def test_a_turn_cut_short_by_the_end_of_the_drain_is_kept_as_far_as_it_was_sent(
    start_process, tmp_path
):
    flags = ["--listen", "127.0.0.1:0", "--tokenizer", DEMO, "--sessions", tmp_path / "sessions.db"]
    async with MockEngine(step_ms=2, max_model_len=8192) as engine:
        flags += ["--engine", engine.address]
        gateway = await start_process(*flags, "--drain-seconds", "0.2")
        stub = await gateway.stub()
        await gateway.wait_for("serving")
        await stub.CreateSession(pb.CreateSessionRequest(session_id="s"))
        call = stub.Generate(ask([400], 8000))
        got = []
        while len(got) < 5:
            got += (await call.read()).delta.token_ids
        gateway.process.terminate()
        rest, is_ok = await read(call)
        assert not is_ok
        assert await gateway.process.wait() == 0
        gateway = await start_process(*flags)
        stub = await gateway.stub()
        await gateway.wait_for("serving")
        found = await kept(stub)
        assert found[: 1 + len(got) + len(rest)] == [400, *got, *rest]
        assert found == [400, *expected_tokens([400], 7, 0, len(found) - 1)]


@pytest.mark.parametrize("kind", ["garbage", "foreign", "in use"])
def test_a_file_that_cannot_be_used_is_one_line_and_exit_1(tmp_path, kind):
    path = tmp_path / "sessions.db"
    lock = None
    if kind == "garbage":
        path.write_bytes(b"no database " * 1000)
    else:
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("CREATE TABLE other (x)")
        if kind == "in use":
            lock.execute("BEGIN EXCLUSIVE")
    command = [*COMMAND, "--listen", "127.0.0.1:0", "--tokenizer", str(DEMO), "--sessions", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if "cannot start" in line]
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert "Traceback" not in result.stderr
    if lock is not None:
        lock.close()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--session-ttl", "0"], "--session-ttl"),
        (["--session-ttl", "nan"], "--session-ttl"),
        (["--max-sessions", "0"], "--max-sessions"),
        (["--max-sessions-per-key", "0"], "--max-sessions-per-key"),
        (["--max-session-tokens", "0"], "--max-session-tokens"),
        (["--session-retain-seconds", "86401"], "--session-retain-seconds"),
        (["--session-retain-seconds", "-1"], "--session-retain-seconds"),
        (["--sessions", "x", "--processes", "2"], "--sessions"),
    ],
)
def test_bad_flags_of_sessions(flags, named, capsys):
    with pytest.raises(SystemExit) as caught:
        load(["--tokenizer", "x", *flags])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
