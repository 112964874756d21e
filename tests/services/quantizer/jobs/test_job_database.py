"""Jobs in the database: each change guarded by its lease, decided by a clock that no one sets, or refused."""

import dataclasses
import sqlite3

import pytest

from services.quantizer.jobs.clock import Clock
from services.quantizer.jobs.database import Database
from services.quantizer.jobs.job import (
    DatabaseRefused,
    Lease,
    LeaseLost,
    NewJob,
    QueueFull,
    RequestReused,
    State,
)


class FakeClock(Clock):
    """Both clocks stand still until they are set."""

    def __init__(self):
        self.boot, self.time, self.wall = "boot-1", 100.0, 1_800_000_000_000

    def now(self):
        return self.time

    def wall_ms(self):
        return self.wall


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def database(tmp_path, clock):
    made = Database(tmp_path / "jobs.sqlite", clock)
    for owner in ("a", "b"):
        made.heartbeat(owner, 20.0)
    yield made
    made.close()


def new(number=1, name="model", **changes):
    job = NewJob(f"job-{number}", "", f"request-{number}", "digest", name, "{}", "")
    return dataclasses.replace(job, **changes)


def create(database, *args, **changes):
    return database.create(new(*args, **changes), 100, 1000)[0]


def claim(database, owner="a", device="cpu", floor=0):
    return database.claim(owner, device, lambda _name: floor)


def test_the_file_is_as_durable_as_it_can_be(database):
    connection = database._connection
    for pragma, expected in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
        assert connection.execute(f"PRAGMA {pragma}").fetchone() == (expected,)
    assert connection.execute("PRAGMA busy_timeout").fetchone() == (5000,)


def test_the_same_request_is_the_same_job_and_another_body_is_refused(database):
    first, is_new = database.create(new(), 100, 1000)
    assert is_new
    assert database.create(new(job_id="job-other"), 100, 1000) == (first, False)
    with pytest.raises(RequestReused):
        database.create(new(job_id="job-other", body_digest="else"), 100, 1000)
    assert database.create(new(job_id="job-other", caller="someone"), 100, 1000)[1]


def test_a_full_queue_is_refused_but_not_a_repeated_request(database):
    create(database, 1)
    with pytest.raises(QueueFull):
        database.create(new(2), 1, 1000)
    assert not database.create(new(1), 1, 1000)[1]


def test_pages_are_newest_first_whatever_the_wall_clock_said(database, clock):
    for number in range(5):
        clock.wall -= 3_600_000
        create(database, number)
    jobs = database.page(None, 3)
    assert [job.job_id for job in jobs] == ["job-4", "job-3", "job-2"]
    assert [job.job_id for job in database.page(jobs[-1].sequence, 3)] == ["job-1", "job-0"]


def test_sql_in_every_string_is_text(database):
    evil = "'; DROP TABLE jobs; --"
    job = create(database, 1, name=evil, request_id=evil, caller=evil, spec=evil, job_id=evil)
    _, lease = claim(database)
    database.progress(lease, evil, 1, 2, None, is_publishing=False)
    database.save_log(lease, [evil])
    database.end(lease, State.FAILED, evil, evil)
    assert database.get(evil).name == job.name == evil
    assert database.log_lines(evil) == [evil]


def test_two_jobs_of_one_name_never_run_at_once(database):
    create(database, 1)
    create(database, 2)
    create(database, 3, name="other")
    job, lease = claim(database)
    assert job.job_id == "job-1"
    assert claim(database, "b")[0].job_id == "job-3"
    assert claim(database, "b") is None
    database.end(lease, State.SUCCEEDED, "published", "v1")
    assert claim(database, "b")[0].job_id == "job-2"


def test_tokens_grow_and_begin_above_what_the_volume_has_seen(database):
    for number in range(3):
        create(database, number, name=f"m{number}")
    tokens = [claim(database, floor=floor)[1].token for floor in (0, 40, 7)]
    assert tokens == [1, 41, 42]


@pytest.mark.parametrize(
    ("wanted", "device", "is_taken"),
    [
        ("", "cuda:1", True),
        ("cpu", "cpu", True),
        ("cpu", "cuda:0", False),
        ("cuda", "cuda:3", True),
        ("cuda:1", "cuda:0", False),
        ("cuda:1", "cuda:1", True),
    ],
)
def test_devices(database, wanted, device, is_taken):
    create(database, 1, device=wanted)
    assert (claim(database, device=device) is not None) == is_taken


def test_a_job_from_beginning_to_end(database):
    create(database)
    job, lease = claim(database)
    assert (job.state, job.attempt, job.device) == (State.RUNNING, 1, "cpu")
    database.progress(lease, "block 1", 1, 3, 9.5, is_publishing=False)
    assert database.get("job-1").eta_s == 9.5
    database.progress(lease, "publishing", 2, 3, None, is_publishing=True)
    database.progress(lease, "late news", 2, 3, None, is_publishing=False)
    assert database.get("job-1").state is State.PUBLISHING
    database.end(lease, State.SUCCEEDED, "published", "awq-1")
    job = database.get("job-1")
    assert (job.state, job.done, job.artifact_version) == (State.SUCCEEDED, 3, "awq-1")
    assert job.ended_ms is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda database, lease: database.progress(lease, "x", 1, 1, None, is_publishing=False),
        lambda database, lease: database.end(lease, State.SUCCEEDED, "x"),
        lambda database, lease: database.requeue(lease, "x", 0, is_crash=False),
        lambda database, lease: database.save_log(lease, ["x"]),
    ],
)
@pytest.mark.parametrize("stale", [{"owner": "b"}, {"token": 2}, {"token": 0}, {"job_id": "job-2"}])
def test_whoever_does_not_hold_the_lease_changes_nothing(database, change, stale):
    create(database)
    before, lease = claim(database)
    with pytest.raises(LeaseLost):
        change(database, dataclasses.replace(lease, **stale))
    assert database.get("job-1") == before
    assert database.log_lines("job-1") == []
    database.end(lease, State.FAILED, "x")
    with pytest.raises(LeaseLost):
        change(database, lease)


def test_a_job_that_is_given_back_waits_by_the_clock_that_no_one_sets(database, clock):
    create(database)
    _, lease = claim(database)
    database.requeue(lease, "busy", 30.0, is_crash=True)
    clock.wall += 10**9
    assert claim(database) is None
    clock.time += 30
    job, second = claim(database)
    assert (job.attempt, job.crashes) == (2, 1)
    assert second.token > lease.token
    database.requeue(second, "busy", 30.0, is_crash=False)
    clock.boot, clock.time = "boot-2", 1.0
    assert claim(database)[0].attempt == 3


def test_leases_run_out_by_the_clock_that_no_one_sets(database, clock):
    create(database)
    _, lease = claim(database, "a")
    clock.wall += 10**12
    assert database.take_over("b", []) == []
    clock.wall -= 2 * 10**12
    clock.time += 19.0
    assert database.take_over("b", []) == []
    clock.time += 2.0
    database.heartbeat("b", 20.0)
    assert database.take_over("b", []) == ["job-1"]
    job, newer = claim(database, "b")
    assert job.attempt == 2
    assert newer.token > lease.token
    with pytest.raises(LeaseLost):
        database.end(lease, State.SUCCEEDED, "published", "v1")
    assert database.held("a") == {}
    database.heartbeat("a", 20.0)
    assert database.held("b") == {"job-1": (newer.token, False)}


def test_a_restarted_machine_and_a_dead_service_end_leases_at_once(database, clock):
    create(database, 1)
    create(database, 2, name="other")
    claim(database, "a")
    assert database.take_over("b", ["a"]) == ["job-1"]
    claim(database, "b")
    clock.boot, clock.time = "boot-2", 5.0
    database.heartbeat("c", 20.0)
    assert database.take_over("c", []) == ["job-1"]
    assert database.owners() == ["c"]


def test_cancel(database):
    create(database, 1)
    create(database, 2, name="other")
    assert database.cancel("job-1").state is State.CANCELLED
    assert database.cancel("job-1") == database.get("job-1")
    assert database.cancel("none") is None
    _, lease = claim(database)
    job = database.cancel("job-2")
    assert (job.state, job.is_cancelled) == (State.RUNNING, True)
    assert database.held("a") == {"job-2": (lease.token, True)}
    database.take_over("b", ["a"])
    assert database.get("job-2").state is State.CANCELLED, "nobody starts it again"


def test_ended_jobs_are_forgotten_oldest_first_and_with_their_logs(database):
    for number in range(4):
        create(database, number)
        _, lease = claim(database)
        database.save_log(lease, ["line"])
        database.end(lease, State.FAILED, "x")
    database.create(new(9), 100, 2)
    assert [job.job_id for job in database.page(None, 10)] == ["job-9", "job-3", "job-2"]
    assert database._connection.execute("SELECT count(*) FROM log_lines").fetchone() == (2,)


def test_the_state_survives_and_keeps_its_id(database, tmp_path, clock):
    create(database)
    other = Database(tmp_path / "jobs.sqlite", clock)
    assert other.get("job-1") == database.get("job-1")
    assert other.state_id() == database.state_id() == other.state_id()
    version = other.version()
    create(database, 2)
    assert other.version() != version
    other.close()


def flip_a_page(path):
    data = bytearray(path.read_bytes())
    for offset in range(4096, len(data), 512):
        data[offset : offset + 64] = b"\xff" * 64
    path.write_bytes(data)


def foreign(path):
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")


def newer(path):
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_page,
        foreign,
        newer,
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b"not a database at all" * 100),
    ],
)
def test_a_file_that_is_not_ours_or_not_whole_is_refused_and_left(tmp_path, clock, damage):
    path = tmp_path / "jobs.sqlite"
    made = Database(path, clock)
    for number in range(50):
        create(made, number, spec="x" * 1000)
    made.close()
    damage(path)
    before = path.read_bytes()
    with pytest.raises(DatabaseRefused, match=r"jobs\.sqlite") as refused:
        Database(path, clock)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == before


def test_an_end_must_be_one(database):
    create(database)
    _, lease = claim(database)
    with pytest.raises(ValueError, match="no end"):
        database.end(lease, State.RUNNING, "x")
    assert isinstance(lease, Lease)


def test_the_machines_clock():
    clock = Clock()
    first = clock.now()
    assert 0 < first <= clock.now()
    assert clock.boot


def test_a_cancelled_job_that_is_given_back_has_ended(database, clock):
    database.create(new(), 10, 10)
    _, lease = database.claim("a", "cpu", lambda _name: 0)
    database.cancel("job-1")
    database.requeue(lease, "busy", 2.0, is_crash=False)
    job = database.get("job-1")
    assert (job.state, job.message, job.ended_ms) == (State.CANCELLED, "cancelled", clock.wall)
    assert database.last_token() == lease.token
