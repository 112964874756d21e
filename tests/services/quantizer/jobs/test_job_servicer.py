"""The wire: what is refused and how, pages, watchers who come, go and sleep."""

import asyncio
import gc

import grpc
import pytest

from services.quantizer.jobs import supervisor
from services.quantizer.jobs.database import Database
from services.quantizer.jobs.store import DatabaseUnavailable
from services.quantizer.rpc.servicer import SERVICE_NAME, QuantizerServicer
from weft.rpc.address import parse_address
from weft.rpc.channel import open_channel
from weft.rpc.errors import error_from_call
from weft.rpc.server import Server
from weft.v1 import quantizer_service_pb2 as pb
from weft.v1.quantizer_service_pb2_grpc import QuantizerServiceStub, add_QuantizerServiceServicer_to_server


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(supervisor, "LOOK_S", 0.02)


@pytest.fixture
async def make_stub(make_service):
    """await make_stub(...) -> (stub, service)"""
    opened = []

    async def make(max_queued=100, **options):
        service = await make_service(**options)
        server = Server([SERVICE_NAME], is_public=True)
        service.server = server
        await server.start(parse_address("127.0.0.1:0"))
        servicer = QuantizerServicer(
            service.store,
            service.supervisor,
            service.watchers,
            service.rules,
            max_queued=max_queued,
            max_kept=100,
        )
        add_QuantizerServiceServicer_to_server(servicer, server.grpc)
        server.set_serving()
        channel = open_channel(str(server.address))
        opened.append((server, channel))
        return QuantizerServiceStub(channel), service

    yield make
    for server, channel in opened:
        await channel.close()
        await server.stop(0)


def create(request_id="first", name="model", **spec):
    return pb.CreateJobRequest(
        request_id=request_id, spec=pb.JobSpec(**{"source": "tiny", "name": name, **spec})
    )


async def refused(call):
    """The error of a call that must fail."""
    async with asyncio.timeout(20):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    return error_from_call(caught.value)


async def test_create_is_repeatable_and_another_body_is_not(make_stub):
    stub, _ = await make_stub()
    first = (await stub.CreateJob(create(seed=0))).job
    assert first.spec == pb.JobSpec(source="tiny", name="model", seed=0)
    assert first.spec.HasField("seed")
    assert (await stub.CreateJob(create(seed=0))).job.job_id == first.job_id
    for other in (create(), create(seed=1), create(seed=0, name="other")):
        assert (await refused(stub.CreateJob(other))).code is grpc.StatusCode.ALREADY_EXISTS


REFUSED = {
    "no request id": (create(request_id=""), ["request_id"]),
    "a request id of anything": (create(request_id="a/b\n"), ["request_id"]),
    "a long request id": (create(request_id="x" * 129), ["request_id"]),
    "no spec": (pb.CreateJobRequest(request_id="a"), ["spec.source"]),
    "source out": (create(source="../x"), ["spec.source"]),
    "a name of a megabyte": (create(name="x" * (1 << 20)), ["spec"]),
    "a source of a megabyte": (create(source="x" * (1 << 20)), ["spec"]),
    "a million texts": (create(calibration=["x"] * 100_000), ["spec"]),
    "a bad name": (create(name="A/B"), ["spec.name"]),
    "a group of 7": (create(group_size=7), ["spec.group_size"]),
    "too many samples": (create(samples=2**32 - 1), ["spec.samples"]),
    "not a number": (create(max_kl=float("nan")), ["spec.max_kl"]),
    "a device that is not there": (create(device="cuda:7"), ["spec.device"]),
    "the hub": (create(source="a/b", revision="0" * 40), ["spec.revision"]),
    "two at once": (create(request_id="", source="/x"), ["request_id", "spec.source"]),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_wrong_is_named(make_stub, case):
    request, fields = REFUSED[case]
    stub, _ = await make_stub()
    error = await refused(stub.CreateJob(request))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [field for field, _ in error.field_violations] == fields
    assert not (await stub.ListJobs(pb.ListJobsRequest())).jobs


async def test_fields_from_the_future_are_refused(make_stub):
    stub, _ = await make_stub()
    request = pb.CreateJobRequest.FromString(create().SerializeToString() + b"\xf8\x07\x01")
    error = await refused(stub.CreateJob(request))
    assert error.field_violations[0][0] == "127"


async def test_a_full_queue_says_when_to_come_back(make_stub):
    stub, service = await make_stub(max_queued=2)
    await stub.CreateJob(create("running"))
    await service.runner.next()
    for number in range(2):
        await stub.CreateJob(create(f"r{number}"))
    error = await refused(stub.CreateJob(create("r2")))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.retry_after_s > 0
    await stub.CreateJob(create("r1"))


@pytest.mark.parametrize("job_id", ["", "no/job", "x" * 100, "' OR 1=1 --"])
async def test_ids_that_are_none(make_stub, job_id):
    stub, _ = await make_stub()
    for call in (
        stub.GetJob(pb.GetJobRequest(job_id=job_id)),
        stub.CancelJob(pb.CancelJobRequest(job_id=job_id)),
        stub.WatchJob(pb.WatchJobRequest(job_id=job_id)).read(),
    ):
        assert (await refused(call)).field_violations[0][0] == "job_id"


async def test_jobs_that_are_not_there(make_stub):
    stub, service = await make_stub()
    for call in (
        stub.GetJob(pb.GetJobRequest(job_id="job-1")),
        stub.CancelJob(pb.CancelJobRequest(job_id="job-1")),
        stub.WatchJob(pb.WatchJobRequest(job_id="job-1")).read(),
    ):
        assert (await refused(call)).code is grpc.StatusCode.NOT_FOUND
    assert len(service.watchers) == 0


async def test_pages(make_stub):
    stub, _ = await make_stub()
    ids = [(await stub.CreateJob(create(f"r{number}", f"m{number}"))).job.job_id for number in range(5)]
    seen, token = [], ""
    for _ in range(3):
        page = await stub.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token))
        seen += [job.job_id for job in page.jobs]
        token = page.next_page_token
    assert seen == ids[::-1]
    assert token == ""
    for wrong in ({"page_size": 1001}, {"page_token": "x"}, {"page_token": "-1"}, {"page_token": "9" * 30}):
        error = await refused(stub.ListJobs(pb.ListJobsRequest(**wrong)))
        assert error.field_violations[0][0] == next(iter(wrong))


async def test_a_queued_job_is_cancelled_at_once_and_for_good(make_stub):
    stub, service = await make_stub()
    await stub.CreateJob(create("a"))
    await service.runner.next()
    job = (await stub.CreateJob(create("b"))).job
    for _ in range(3):
        answer = (await stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))).job
        assert answer.state == pb.JOB_STATE_CANCELLED
    assert (await stub.CreateJob(create("b"))).job.state == pb.JOB_STATE_CANCELLED


async def test_watchers_see_the_end_and_leave_nothing(make_stub):
    stub, service = await make_stub()
    job = (await stub.CreateJob(create())).job
    run = await service.runner.next()
    call = aiter(stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id)))
    assert (await anext(call)).job.job_id == job.job_id
    run.say("progress", done=1, total=2, what="block 1")
    run.end(0, first_line="x/v1")
    states = [response.job.state async for response in call]
    assert states[-1] == pb.JOB_STATE_SUCCEEDED
    assert len(service.watchers) == 0
    again = [response.job async for response in stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id))]
    assert len(again) == 1, "a job that has ended is told once"


async def test_a_hundred_watchers_that_go_away_leave_nothing(make_stub):
    stub, service = await make_stub()
    job = (await stub.CreateJob(create())).job
    run = await service.runner.next()
    calls = [stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id)) for _ in range(100)]
    await asyncio.gather(*(call.read() for call in calls))
    assert len(service.watchers) == 100
    error = await refused(stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id)).read())
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in calls:
        call.cancel()
    async with asyncio.timeout(20):
        while len(service.watchers):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert service.watchers._events == {}
    counters = service.server.counters
    assert counters.begun == counters.ended
    run.say("progress", done=1, total=2, what="block 1")
    await service.until(job.job_id, lambda found: found.done == 1)
    gc.collect()


async def test_a_watcher_that_sleeps_gets_the_latest_state_not_every_one(make_stub):
    stub, service = await make_stub()
    job = (await stub.CreateJob(create())).job
    run = await service.runner.next()
    written = []
    with service.watchers.watch(job.job_id) as changed:
        for done in range(1, 200):
            run.say("progress", done=done, total=200, what=f"block {done}")
        await service.until(job.job_id, lambda found: found.done == 199)
        for _ in range(3):
            if changed.is_set():
                changed.clear()
                written.append((await service.get(job.job_id)).done)
    assert written == [199]


async def test_watchers_are_sent_away_when_the_service_stops(make_stub):
    stub, service = await make_stub()
    job = (await stub.CreateJob(create())).job
    await service.runner.next()
    call = aiter(stub.WatchJob(pb.WatchJobRequest(job_id=job.job_id)))
    await anext(call)
    await service.supervisor.stop()
    service.watchers.close()

    async def read_on():
        async for _ in call:
            pass

    error = await refused(read_on())
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.retry_after_s > 0
    error = await refused(stub.CreateJob(create("late")))
    assert error.code is grpc.StatusCode.UNAVAILABLE


async def test_a_database_that_does_not_answer_is_unavailable(make_stub, monkeypatch):
    stub, service = await make_stub()

    async def fail(*_arguments, **_options):
        raise DatabaseUnavailable("database or disk is full: /secret/path")

    monkeypatch.setattr(service.store, "run", fail)
    for call in (stub.CreateJob(create()), stub.ListJobs(pb.ListJobsRequest())):
        error = await refused(call)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert "secret" not in error.message
    monkeypatch.undo()


async def test_the_log_comes_when_it_is_asked_for(make_stub):
    stub, service = await make_stub()
    job = (await stub.CreateJob(create())).job
    run = await service.runner.next()
    for number in range(300):
        run.say("progress", done=number, total=300, what="x" * 5000)
    run.end(1, "error: it broke")
    await service.ended(job.job_id)
    assert not (await stub.GetJob(pb.GetJobRequest(job_id=job.job_id))).log_lines
    lines = (await stub.GetJob(pb.GetJobRequest(job_id=job.job_id, include_log=True))).log_lines
    assert len(lines) == 100
    assert lines[-1] == "error: it broke"
    assert max(map(len, lines)) == 2000
    assert await service.store.run(Database.get, job.job_id)
