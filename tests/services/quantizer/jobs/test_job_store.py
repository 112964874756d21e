"""The database's thread: what passes is told as such, and nothing is half done."""

import sqlite3

import pytest

from services.quantizer.jobs import schema
from services.quantizer.jobs.clock import Clock
from services.quantizer.jobs.database import Database
from services.quantizer.jobs.job import DatabaseRefused, NewJob
from services.quantizer.jobs.store import DatabaseUnavailable, JobStore


@pytest.fixture
async def store(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "BUSY_TIMEOUT_MS", 100)
    made = JobStore(tmp_path / "jobs.sqlite", Clock())
    await made.open()
    yield made
    await made.close()


def new(number, spec="{}"):
    return NewJob(f"job-{number}", "", f"r{number}", "", "m", spec, "")


async def test_a_lock_that_lasts_is_unavailable_and_nothing_is_half_done(store, tmp_path):
    other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable, match="locked"):
        await store.run(Database.create, new(1), 10, 10)
    assert await store.run(Database.page, None, 10) == [], "readers do not wait for writers"
    other.execute("ROLLBACK")
    other.close()
    assert (await store.run(Database.create, new(1), 10, 10))[1]


async def test_a_full_disk_is_unavailable_and_what_was_there_stays(store):
    await store.run(Database.create, new(1), 10, 10)

    def leave_no_room(database):
        (pages,) = database._connection.execute("PRAGMA page_count").fetchone()
        database._connection.execute(f"PRAGMA max_page_count = {pages}")

    await store.run(leave_no_room)
    with pytest.raises(DatabaseUnavailable, match="full"):
        await store.run(Database.create, new(2, "x" * 100_000), 10, 10)
    assert [job.job_id for job in await store.run(Database.page, None, 10)] == ["job-1"]
    await store.run(Database.cancel, "job-1")


async def test_it_can_be_closed_twice_and_is_unavailable_then(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite", Clock())
    with pytest.raises(DatabaseUnavailable):
        await store.run(Database.get, "x")
    await store.open()
    await store.close()
    await store.close()
    with pytest.raises(DatabaseUnavailable):
        await store.run(Database.get, "x")


async def test_a_directory_in_the_way_is_one_line(tmp_path):
    (tmp_path / "jobs.sqlite").mkdir()
    store = JobStore(tmp_path / "jobs.sqlite", Clock())
    with pytest.raises((DatabaseRefused, sqlite3.OperationalError)) as refused:
        await store.open()
    assert isinstance(refused.value, DatabaseRefused)
    await store.close()
