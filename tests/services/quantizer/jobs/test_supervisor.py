"""Who runs what and when: one job per device, one per name, under leases, to an end that is told."""

import asyncio
import dataclasses

import pytest

from services.quantizer.jobs import outcome, supervisor
from services.quantizer.jobs.database import Database
from services.quantizer.jobs.job import State
from services.quantizer.jobs.ownership import Ownership
from services.quantizer.rpc.convert import job_message


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(supervisor, "LOOK_S", 0.02)
    monkeypatch.setattr(supervisor, "BEAT_S", 0.05)
    monkeypatch.setattr(outcome, "BUSY_DELAY_S", 0.02)
    monkeypatch.setattr(outcome, "CRASH_DELAY_S", 0.02)


async def test_a_job_is_followed_to_its_end(make_service):
    service = await make_service()
    job_id = await service.create(samples=4)
    run = await service.runner.next()
    assert run.task.options["samples"] == "4"
    assert run.task.options["device"] == "cpu"
    assert run.task.token == 1
    run.say("plan", blocks=4, resumed_blocks=1)
    run.say("progress", done=2, total=5, what="block 2", seconds=1.0)
    job = await service.until(job_id, lambda job: job.done == 2)
    assert (job.state, job.message, job.total) == (State.RUNNING, "block 2", 5)
    assert 0 <= job.eta_s < 60
    run.say("publishing")
    await service.until(job_id, lambda job: job.state is State.PUBLISHING)
    run.say("published", version="awq-1")
    run.end(0, first_line="/somewhere/awq-2")
    job = await service.ended(job_id)
    assert (job.state, job.artifact_version, job.done) == (State.SUCCEEDED, "awq-1", 5)
    assert len(await service.store.run(Database.log_lines, job_id)) == 4


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (1, "error: {sources}/tiny/config.json: missing", "tiny/config.json: missing"),
        (2, "", "the run ended with status 2"),
        (3, "error: perplexity rose", "perplexity rose"),
        (3, "", "the quality gate was missed"),
    ],
)
async def test_a_job_that_fails_says_why_in_the_runs_words(make_service, code, words, expected):
    service = await make_service()
    job_id = await service.create()
    run = await service.runner.next()
    run.say("progress", done=1, total=2, what="block 1")
    run.end(code, words.format(sources=service.rules.places.sources))
    job = await service.ended(job_id)
    assert (job.state, job.message) == (State.FAILED, expected)


async def test_the_log_of_a_job_that_works_can_be_read(make_service):
    service = await make_service()
    job_id = await service.create()
    run = await service.runner.next()
    run.say("progress", done=1, total=2, what="block 1")
    await service.until(job_id, lambda job: job.done == 1)
    async with asyncio.timeout(20):
        while not (lines := await service.store.run(Database.log_lines, job_id)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "block 1" in lines[0]


async def test_what_is_up_to_date_has_succeeded(make_service):
    service = await make_service()
    job_id = await service.create()
    run = await service.runner.next()
    run.say("up to date", version="awq-1")
    run.end(0, first_line="/a/model/awq-1")
    job = await service.ended(job_id)
    assert (job.state, job.message, job.artifact_version) == (State.SUCCEEDED, "up to date", "awq-1")
    message = job_message(job)
    assert message.progress == 1.0
    assert not message.HasField("eta_seconds")


async def test_a_spec_that_no_longer_holds_fails_the_job(make_service, tmp_path):
    service = await make_service()
    blocker = await service.create("model")
    run = await service.runner.next()
    job_id = await service.create("model", source="tiny")
    (tmp_path / "sources" / "tiny").rmdir()
    run.end(0, first_line="x/v1")
    await service.ended(blocker)
    assert "no such directory" in (await service.ended(job_id)).message


async def test_a_busy_name_is_tried_again_and_a_crash_three_times(make_service):
    service = await make_service()
    job_id = await service.create()
    for _ in range(5):
        (await service.runner.next()).end(4, "error: another run of model is at work")
    for _ in range(3):
        (await service.runner.next()).end(137)
    job = await service.ended(job_id)
    assert (job.state, job.attempt, job.crashes) == (State.FAILED, 8, 2)
    assert job.message == "given up after 3 crashes: the run was ended by SIGKILL (out of memory?)"


async def test_a_run_that_cannot_be_started_is_tried_again(make_service):
    service = await make_service()
    service.runner.fails = 2
    job_id = await service.create()
    (await service.runner.next()).end(0, first_line="x/v1")
    assert (await service.ended(job_id)).state is State.SUCCEEDED


async def test_one_job_a_device_and_one_a_name(make_service):
    service = await make_service(devices=("cuda:0", "cuda:1"))
    first = await service.create("a")
    second = await service.create("a")
    other = await service.create("b", device="cuda")
    runs = [await service.runner.next(), await service.runner.next()]
    assert {run.task.device for run in runs} == {"cuda:0", "cuda:1"}
    assert {run.task.job_id for run in runs} == {first, other}
    await asyncio.sleep(0.1)
    assert service.runner.begun.empty()
    assert (await service.get(second)).state is State.QUEUED
    next(run for run in runs if run.task.job_id == first).end(0, first_line="x/v1")
    last = await service.runner.next()
    assert last.task.job_id == second
    assert last.task.token > max(run.task.token for run in runs)


async def test_a_cancelled_run_is_stopped_and_one_that_had_published_has_succeeded(make_service):
    service = await make_service()
    job_id = await service.create()
    run = await service.runner.next()
    for _ in range(3):
        await service.store.run(Database.cancel, job_id)
        service.supervisor.cancel(job_id)
    assert (await service.ended(job_id)).state is State.CANCELLED
    assert run.num_stops == 1
    job_id = await service.create()
    run = await service.runner.next()
    run.obeys = False
    await service.store.run(Database.cancel, job_id)
    service.supervisor.cancel(job_id)
    run.end(0, first_line="x/v1")
    assert (await service.ended(job_id)).state is State.SUCCEEDED


async def test_a_cancel_while_the_run_is_being_started(make_service, monkeypatch):
    service = await make_service()
    await asyncio.sleep(0.1)  # past its first look around
    real = service.runner.start

    async def start(task):
        await service.store.run(Database.cancel, task.job_id)
        service.supervisor.cancel(task.job_id)
        return await real(task)

    monkeypatch.setattr(service.runner, "start", start)
    job_id = await service.create()
    assert (await service.ended(job_id)).state is State.CANCELLED


async def test_a_service_that_stops_gives_its_jobs_back(make_service):
    first = await make_service()
    job_id = await first.create()
    run = await first.runner.next()
    await first.supervisor.stop()
    assert run.num_stops == 1
    job = await first.get(job_id)
    assert (job.state, job.crashes) == (State.QUEUED, 0)
    assert "goes on" in job.message
    assert await first.store.run(Database.owners) == []
    second = await make_service()
    run = await second.runner.next()
    assert (run.task.job_id, run.task.token) == (job_id, 2)
    run.end(0, first_line="x/v1")
    assert (await second.ended(job_id)).attempt == 2


async def test_a_frozen_service_loses_its_job_and_cannot_change_it(make_service, monkeypatch):
    monkeypatch.setattr(supervisor, "LEASE_S", 0.3)
    frozen = await make_service()
    job_id = await frozen.create()
    run = await frozen.runner.next()
    frozen.supervisor._tasks[0].cancel()  # its heart stops; its process, and so its lock, is there
    other = await make_service()
    taken = await other.runner.next()
    assert taken.task.token > run.task.token
    run.say("progress", done=1, total=2, what="late")
    run.end(0, first_line="x/v1")
    async with asyncio.timeout(10):
        while frozen.supervisor._active:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    job = await other.get(job_id)
    assert (job.state, job.message) == (State.RUNNING, "starting")
    taken.end(0, first_line="x/v2")
    assert (await other.ended(job_id)).artifact_version == "v2"


async def test_a_service_that_hears_of_its_loss_stops_the_run(make_service):
    service = await make_service()
    job_id = await service.create()
    run = await service.runner.next()
    await asyncio.sleep(0.1)
    other = Database(service.store._path, service.clock)
    ownership = Ownership(service.store._path.parent)  # with a lock, or the service takes the job back
    other.heartbeat(ownership.owner, 60.0)
    other.take_over(ownership.owner, [service.ownership.owner])
    assert other.claim(ownership.owner, "cpu", lambda _name: 0) is not None
    async with asyncio.timeout(20):
        while service.supervisor._active:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert run.num_stops == 1
    assert other.get(job_id).attempt == 2
    other.close()
    ownership.release()


async def test_a_job_can_be_cancelled_by_way_of_another_service(make_service):
    first = await make_service()
    job_id = await first.create()
    run = await first.runner.next()
    second = await make_service()
    assert second.runner.is_live(job_id, run.task.token)
    await second.store.run(Database.cancel, job_id)
    assert (await second.ended(job_id)).state is State.CANCELLED
    assert run.num_stops == 1


async def test_a_database_that_is_locked_for_a_while_loses_nothing(make_service, monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "RETRY_S", 0.02)
    service = await make_service()
    job_id = await service.create()
    run = await service.runner.next()
    real, failures = service.store.run, [3]

    async def run_or_fail(method, *arguments, **options):
        if method is Database.end and failures[0]:
            failures[0] -= 1
            raise supervisor.DatabaseUnavailable("database is locked")
        return await real(method, *arguments, **options)

    monkeypatch.setattr(service.store, "run", run_or_fail)
    run.end(0, first_line="x/v1")
    assert (await service.ended(job_id)).state is State.SUCCEEDED
    assert failures == [0]


async def test_a_bug_in_one_attempt_does_not_end_the_device(make_service, monkeypatch):
    service = await make_service()
    real = service.runner.start
    calls = []

    async def start(task):
        calls.append(task)
        if len(calls) == 1:
            raise RuntimeError("a bug")
        return await real(task)

    monkeypatch.setattr(service.runner, "start", start)
    broken = await service.create("a")
    sound = await service.create("b")
    (await service.runner.next()).end(0, first_line="x/v1")
    assert (await service.ended(sound)).state is State.SUCCEEDED
    job = await service.get(broken)
    assert (job.state, job.message) == (State.QUEUED, "internal error")


async def test_a_service_that_was_taken_for_dead_while_idle_works_on(make_service):
    service = await make_service()
    service.supervisor._tasks[0].cancel()
    other = Database(service.store._path, service.clock)
    other.heartbeat("other", 60.0)
    other.take_over("other", [service.ownership.owner])
    other.close()
    job_id = await service.create()
    await asyncio.sleep(0.1)
    assert (await service.get(job_id)).state is State.QUEUED
    await service.store.run(Database.heartbeat, service.ownership.owner, 60.0)
    (await service.runner.next()).end(0, first_line="x/v1")
    assert (await service.ended(job_id)).state is State.SUCCEEDED


async def test_who_takes_a_job_over_ends_what_its_service_left(make_service, monkeypatch):
    monkeypatch.setattr(supervisor, "LEASE_S", 0.3)
    frozen = await make_service()
    other = await make_service()
    other.supervisor._tasks[1].cancel()  # it claims nothing: the job stays in the queue
    job_id = await frozen.create()
    run = await frozen.runner.next()
    other.runner.is_live = None
    for task in frozen.supervisor._tasks:
        task.cancel()
    async with asyncio.timeout(20):
        while other.runner.is_live is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not other.runner.is_live(job_id, run.task.token)
    assert other.runner.is_live("begun meanwhile", run.task.token + 1)


def test_verdicts_wait_longer_and_longer_but_not_for_ever():
    delays = [
        outcome.judge(
            outcome.Ended(4, ""), "", "", crashes=0, attempt=n, is_cancelled=False, is_stopping=False
        ).delay_s
        for n in (1, 2, 3, 100)
    ]
    assert delays[:3] == sorted(delays[:3])
    assert len(set(delays)) == 4
    assert delays[3] <= 60
    assert dataclasses.is_dataclass(outcome.Verdict)
