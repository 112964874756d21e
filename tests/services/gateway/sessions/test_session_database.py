"""Sessions in their file: what is kept to the token, what is refused, what outlives kill -9."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.sessions.database import (
    NoRoom,
    SessionDamaged,
    SessionDatabase,
    SessionExists,
    SessionLimits,
    StoredSession,
)
from services.gateway.sessions.schema import StoreRefused
from services.gateway.sessions.store import SessionStore
from weft.rpc.errors import StatusError

ROOT = Path(__file__).resolve().parents[4]
LIMITS = SessionLimits(ttl_s=10.0, max_sessions=5, max_sessions_per_key=3, max_tokens=100)


def new(session_id="s", owner="a", used_ms=1000, roles=()):
    return StoredSession(0, owner, session_id, "demo", "v1", "sha256:0", used_ms, 0, 0, roles)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sessions.db"


@pytest.fixture
def database(path):
    database = SessionDatabase(path, LIMITS)
    yield database
    database.close()


def tokens(database, session_id="s", owner="a"):
    found = database.load(owner, session_id)
    return found.token_ids, found.num_output


def test_turns_are_kept_to_the_token_and_outlive_a_restart(path):
    database = SessionDatabase(path, LIMITS)
    database.create(new(), ())
    database.append(database.get("a", "s"), [0, 2**32 - 1], [7], ("user", "assistant"), 2000)
    database.append(database.get("a", "s"), [5], [6, 1], None, 3000)
    database.close()
    database = SessionDatabase(path, LIMITS)
    assert tokens(database) == ([0, 2**32 - 1, 7, 5, 6, 1], 2)
    session = database.get("a", "s")
    assert (session.num_turns, session.num_tokens, session.used_ms, session.roles) == (2, 6, 3000, None)
    assert database.num_tokens == 6
    database.close()


def test_the_file_is_for_nobody_else(database, path):
    assert path.stat().st_mode & 0o777 == 0o600
    for side in path.parent.iterdir():
        assert side.stat().st_mode & 0o077 == 0, side


def test_ids_belong_to_their_owner(database):
    database.create(new(owner="a"), ())
    database.create(new(owner="b"), ())
    with pytest.raises(SessionExists):
        database.create(new(owner="a"), ())
    assert database.delete("b", "s")
    assert not database.delete("b", "s")
    assert database.get("b", "s") is None
    assert database.get("a", "s") is not None


def test_limits_on_sessions(database):
    for number in range(3):
        database.create(new(f"s{number}"), ())
    with pytest.raises(NoRoom, match="one key"):
        database.create(new("s3"), ())
    for number in range(2):
        database.create(new(f"s{number}", owner="b"), ())
    with pytest.raises(NoRoom, match="5 sessions"):
        database.create(new("s", owner="c"), ())


def test_expired_sessions_make_room_but_those_in_use_stay(database):
    rows = [database.create(new(f"s{number}", used_ms=1000 + number), ()) for number in range(3)]
    database.append(rows[0], [1], [2, 3], (), 1000)
    assert database.num_tokens == 3
    busy = {rows[1].number}
    database.create(new("late", used_ms=20_000), busy)
    assert [database.get("a", f"s{n}") is not None for n in range(3)] == [False, True, False]
    assert database.num_tokens == 0
    assert database.sweep(20_000, ()) == 1
    assert database.sweep(20_000, ()) == 0
    assert database.get("a", "late") is not None


def test_a_row_that_was_changed_meanwhile_takes_no_turn(database):
    session = database.create(new(), ())
    database.append(session, [1], [2], (), 1000)
    with pytest.raises(SessionDamaged):
        database.append(session, [3], [4], (), 1000)
    assert tokens(database) == ([1, 2], 1)
    assert database.num_tokens == 2


def test_a_turn_is_kept_whole_or_not_at_all(database, monkeypatch):
    session = database.create(new(), ())
    # The second statement of the transaction fails.
    database._connection.execute("DROP TABLE turns")
    with pytest.raises(sqlite3.OperationalError):
        database.append(session, [1], [2], (), 5000)
    assert (database.get("a", "s").num_turns, database.num_tokens) == (0, 0)


def test_tokens_that_do_not_add_up_are_damage(database):
    session = database.create(new(), ())
    database.append(session, [1], [2], (), 1000)
    database._connection.execute("UPDATE turns SET output = x'0000'")
    with pytest.raises(SessionDamaged):
        database.load("a", "s")
    database._connection.execute("DELETE FROM turns")
    with pytest.raises(SessionDamaged):
        database.load("a", "s")


def test_a_second_process_is_refused(database, path):
    with pytest.raises(StoreRefused, match="another process has it open"):
        SessionDatabase(path, LIMITS)


@pytest.mark.parametrize("damage", ["garbage", "page", "foreign", "version", "directory", "no folder"])
def test_what_cannot_be_used_is_refused_in_one_line_and_left_as_it_is(path, damage):
    if damage == "no folder":
        path = path.parent / "nowhere" / "sessions.db"
    elif damage == "directory":
        path.mkdir()
    elif damage == "garbage":
        path.write_bytes(b"this is no database, whatever its name says" * 100)
    elif damage == "foreign":
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE t (x)")
        connection.close()
    else:
        database = SessionDatabase(path, SessionLimits())
        for number in range(200):
            session = database.create(new(f"s{number}"), ())
            database.append(session, range(100), [1], (), 1000)
        if damage == "version":
            database._connection.execute("PRAGMA user_version = 9")
        database.close()
        if damage == "page":
            data = bytearray(path.read_bytes())
            for page in range(2, len(data) // 4096, 3):
                data[page * 4096 : page * 4096 + 512] = os.urandom(512)
            path.write_bytes(data)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreRefused) as caught:
        SessionDatabase(path, LIMITS)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_names_are_never_sql(database):
    evil = "'; DROP TABLE sessions; --"
    database.create(new(evil, owner=evil, roles=(evil,)), ())
    assert database.get(evil, evil).roles == (evil,)
    assert database.get("a", "' OR 1=1") is None


@pytest.mark.parametrize("is_swept", [False, True])
def test_what_was_deleted_is_not_in_the_files(path, is_swept):
    database = SessionDatabase(path, LIMITS)
    session = database.create(new(), ())
    secret = [0x5EC12E75] * 20
    database.append(session, secret, [1], (), 1000)
    pattern = b"\x75\x2e\xc1\x5e" * 4
    assert any(pattern in side.read_bytes() for side in path.parent.iterdir())
    if is_swept:
        assert database.sweep(10**9, ()) == 1
    else:
        database.delete("a", "s")
    assert all(pattern not in side.read_bytes() for side in path.parent.iterdir())
    database.close()


_CHILD = """
import sys
from services.gateway.sessions.database import SessionDatabase, SessionLimits, StoredSession
from pathlib import Path
database = SessionDatabase(Path(sys.argv[1]), SessionLimits())
session = database.get("a", "s")
if session is None:
    session = database.create(StoredSession(0, "a", "s", "demo", "v1", "d", 1, 0, 0, ()), ())
while True:
    number = session.num_turns
    database.append(session, [number] * 3, [number] * 2, (), 1)
    session = database.get("a", "s")
    print(session.num_turns, flush=True)
"""


def test_kill_9_loses_no_turn_that_was_said_to_be_kept(path):
    said = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(20):
            said = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split("\n")[:-1]
        child.wait()
        said = int(rest[-1]) if rest else said
        database = SessionDatabase(path, SessionLimits())
        found = database.load("a", "s")
        # One more may have been committed and not said.
        assert said <= found.session.num_turns <= said + 1
        assert found.token_ids == [n for n in range(found.session.num_turns) for _ in range(5)]
        database.close()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 3)), max_size=40))
def test_any_history_leaves_what_a_dictionary_would(commands):
    database = SessionDatabase(None, LIMITS)
    model, clock = {}, 1000
    for what, owner_number, number in commands:
        owner, name = "abc"[owner_number], f"s{number}"
        alive = {key: entry for key, entry in model.items() if entry[0] >= clock - 10_000}
        if what == 0:
            own = [key for key in alive if key[0] == owner]
            try:
                database.create(new(name, owner=owner, used_ms=clock), ())
            except SessionExists:
                assert (owner, name) in alive
            except NoRoom:
                assert len(alive) >= 5 or len(own) >= 3
            else:
                assert (owner, name) not in alive
                alive[owner, name] = (clock, [])
            model = alive  # A refusal that comes after the sweep undoes it; nobody can see that.
        elif what == 1:
            assert database.delete(owner, name) or (owner, name) not in alive
            model.pop((owner, name), None)
        elif what == 2 and (session := database.get(owner, name)) and (owner, name) in model:
            turn = [clock % 97] * number
            database.append(session, turn, [number + 1], (), clock)
            model[owner, name] = (clock, [*model[owner, name][1], *turn, number + 1])
        elif what == 3:
            database.sweep(clock, ())
            model = alive
        clock += 900
        for key, (_, expected) in model.items():
            assert tokens(database, key[1], key[0])[0] == expected
    database.sweep(clock, ())
    kept = {key: entry for key, entry in model.items() if entry[0] >= clock - 10_000}
    assert database.num_tokens == sum(len(entry[1]) for entry in kept.values())
    assert database.num_sessions == len(kept)
    database.close()


async def test_the_store_works_on_one_thread_of_its_own(path):
    store = SessionStore(path, LIMITS)
    seen = {await store.run(lambda database: threading.current_thread().name) for _ in range(5)}
    assert len(seen) == 1
    assert threading.current_thread().name not in seen
    await store.close()


async def test_what_sqlite_cannot_do_is_unavailable_and_says_nothing_of_the_file(path, caplog):
    store = SessionStore(path, LIMITS)
    with pytest.raises(StatusError) as caught:
        await store.run(lambda database: database._connection.execute("SELECT * FROM nothing"))
    assert (caught.value.code.name, caught.value.reason) == ("UNAVAILABLE", "SESSIONS_UNAVAILABLE")
    assert caught.value.retry_after_s
    assert "nothing" not in caught.value.message
    await store.close()


def test_a_refused_file_leaves_no_thread(path):
    path.write_bytes(b"garbage" * 1000)
    before = set(threading.enumerate())  # Some of them may just be ending.
    with pytest.raises(StoreRefused):
        SessionStore(path, LIMITS)
    assert set(threading.enumerate()) <= before
