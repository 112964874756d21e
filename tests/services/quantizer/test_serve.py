"""The job service as a process: real jobs, killed and resumed; keys; what keeps it from starting."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from services.quantizer.serve import ServeConfig
from weft.artifact.history import read_fence
from weft.artifact.publish import claim_fence
from weft.artifact.store import ArtifactStore
from weft.config import ConfigError, build_config
from weft.rpc import auth
from weft.rpc.channel import open_channel
from weft.rpc.healthcheck import check
from weft.v1 import quantizer_service_pb2 as pb
from weft.v1.quantizer_service_pb2_grpc import QuantizerServiceStub

ROOT = Path(__file__).parents[3]
NAME = "weft.v1.QuantizerService"
# The service needs neither: it must answer before they could be imported, and where they are not installed.
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
    "from services.quantizer.__main__ import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture
def directories(tmp_path):
    """directories() -> the flags that every service needs."""
    for name in ("sources", "artifacts"):
        (tmp_path / name).mkdir()

    def flags(**changes):
        values = {name: tmp_path / name for name in ("sources", "artifacts", "state")} | changes
        return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]

    return flags


@pytest.fixture
def serve():
    """serve(*flags, **variables) -> (process, address)"""
    processes = []

    def start(*flags, **variables):
        process = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_TORCH, "serve", *map(str, flags)],
            cwd=ROOT,
            env={**os.environ, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        lines = []
        for line in process.stderr:
            lines.append(line)
            event = json.loads(line)
            if event["event"] == "serving":
                return process, event["address"]
        raise AssertionError(f"it ended with {process.wait()}: {lines}")

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def terminate(process):
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors
    return process.returncode


TINY = {
    "name": "tiny",
    "group_size": 32,
    "samples": 2,
    "sequence_length": 64,
    "evaluation_tokens": 0,
    "threads": 1,
}


def request(request_id="first", **changes):
    return pb.CreateJobRequest(request_id=request_id, spec=pb.JobSpec(**{**TINY, **changes}))


async def watch(stub, job_id, until=lambda job: False):
    """Every state that was seen, up to the end or to the one that `until` takes."""
    seen = []
    call = stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=120)
    try:
        async for response in call:
            seen.append(response.job)
            if until(response.job):
                break
    finally:
        call.cancel()
    return seen


async def test_a_job_from_its_creation_to_an_artifact_that_loads(
    serve, directories, make_checkpoint, tmp_path
):
    make_checkpoint(num_hidden_layers=1).rename(tmp_path / "sources" / "tiny")
    process, address = serve("--listen=127.0.0.1:0", *directories())
    assert [check(address, name, 5.0) for name in ("", NAME)] == ["SERVING"] * 2
    with grpc.insecure_channel(address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {NAME, "grpc.health.v1.Health"} <= set(services)
    async with open_channel(address) as channel:
        stub = QuantizerServiceStub(channel)
        created = (await stub.CreateJob(request(source="tiny"), timeout=10)).job
        assert created.state == pb.JOB_STATE_QUEUED
        again = (await stub.CreateJob(request(source="tiny"), timeout=10)).job
        assert again.job_id == created.job_id
        seen = await watch(stub, created.job_id)
        last = seen[-1]
        assert last.state == pb.JOB_STATE_SUCCEEDED
        assert pb.JOB_STATE_RUNNING in {job.state for job in seen}
        assert [job.progress for job in seen] == sorted(job.progress for job in seen)
        assert last.progress == 1.0
        assert last.blocks_done == last.blocks_total == 2
        assert last.attempt == 1
        assert last.create_time.seconds <= last.start_time.seconds <= last.end_time.seconds
        got = await stub.GetJob(pb.GetJobRequest(job_id=created.job_id, include_log=True), timeout=10)
        assert got.job == last
        assert any('"event": "published"' in line for line in got.log_lines)
    store = ArtifactStore(tmp_path / "artifacts")
    artifact = store.open("tiny")
    store.verify(artifact)
    assert artifact.version == last.artifact_version
    assert read_fence(tmp_path / "artifacts" / "tiny") == 1
    assert terminate(process) == 0


async def test_keys_and_variables(serve, directories, tmp_path):
    key = "a-key-of-a-test-0123456789"
    keys = tmp_path / "keys"
    keys.write_text(f"tester:{auth.hash_key(key)}\n")
    variables = {"WEFT_QUANTIZER_LISTEN": "127.0.0.1:0", "WEFT_QUANTIZER_API_KEY_FILE": str(keys)}
    process, address = serve(*directories(), **variables)
    async with open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await QuantizerServiceStub(channel).ListJobs(pb.ListJobsRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    async with open_channel(address, key) as channel:
        assert not (await QuantizerServiceStub(channel).ListJobs(pb.ListJobsRequest(), timeout=10)).jobs
    assert terminate(process) == 0


def broken_database(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "jobs.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    return {}


@pytest.mark.parametrize(
    ("changes", "status", "expected"),
    [
        ({"listen": "nowhere"}, 2, "--listen"),
        ({"samples": "3"}, 2, "--samples"),
        ({"devices": "tpu"}, 2, "--devices"),
        ({"devices": "cpu,cpu"}, 2, "--devices"),
        ({"runner": "magic"}, 2, "--runner"),
        ({"max_queued": "0"}, 2, "--max-queued"),
        ({"api_key_file": "/nonexistent/keys"}, 1, "/nonexistent/keys"),
        ({"listen": "192.0.2.1:1"}, 1, "cannot listen on 192.0.2.1:1"),
        ({"sources": "/nonexistent"}, 1, "/nonexistent: no such directory"),
        (lambda path: {"state": path / "artifacts" / "state"}, 1, "must not lie in one another"),
        (lambda path: {"artifacts": path / "sources", "state": path}, 1, "must not lie in one another"),
        (broken_database, 1, "jobs.sqlite"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(directories, tmp_path, changes, status, expected):
    changes = changes(tmp_path) if callable(changes) else changes
    flags = directories(**{"listen": "127.0.0.1:0", **changes})
    command = [sys.executable, "-m", "services.quantizer", "serve", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == status
    assert expected in "".join(done.stderr.splitlines()[-3:])
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "artifacts" / "state").exists(), "what is refused leaves nothing"


def test_a_container_needs_a_place_for_hub_models(tmp_path):
    values = {name: str(tmp_path) for name in ("sources", "artifacts", "state")}
    docker_and_hub = {**values, "runner": "docker", "allow_hub": True}
    with pytest.raises(ConfigError, match="--hub-cache: is required"):
        build_config(ServeConfig, docker_and_hub)
    assert build_config(ServeConfig, {**docker_and_hub, "hub_cache": "/x"}).allow_hub
    assert build_config(ServeConfig, {**values, "allow_hub": True}).allow_hub


def test_a_damaged_database_is_left_as_it_is(directories, tmp_path):
    broken_database(tmp_path)
    before = (tmp_path / "state" / "jobs.sqlite").read_bytes()
    command = [sys.executable, "-m", "services.quantizer", "serve", "--listen=127.0.0.1:0", *directories()]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30).returncode == 1
    assert (tmp_path / "state" / "jobs.sqlite").read_bytes() == before


def children_of(pid):
    """Every process below `pid`."""
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.slow
async def test_a_job_cancelled_midway_goes_on_when_it_is_asked_for_again(
    serve, directories, make_checkpoint, tmp_path
):
    make_checkpoint(num_hidden_layers=6).rename(tmp_path / "sources" / "tiny")
    process, address = serve("--listen=127.0.0.1:0", "--grace=30", *directories())
    async with open_channel(address) as channel:
        stub = QuantizerServiceStub(channel)
        first = (await stub.CreateJob(request("a", source="tiny"), timeout=10)).job
        await watch(stub, first.job_id, until=lambda job: job.blocks_done >= 2)
        assert children_of(process.pid)
        for _ in range(2):
            answer = await stub.CancelJob(pb.CancelJobRequest(job_id=first.job_id), timeout=10)
            assert answer.job.cancel_requested
        last = (await watch(stub, first.job_id))[-1]
        assert last.state == pb.JOB_STATE_CANCELLED
        assert not children_of(process.pid)
        assert not (tmp_path / "artifacts" / "tiny" / "CURRENT").exists()
        answer = await stub.CancelJob(pb.CancelJobRequest(job_id=first.job_id), timeout=10)
        assert answer.job == last
        second = (await stub.CreateJob(request("b", source="tiny"), timeout=10)).job
        seen = await watch(stub, second.job_id)
        assert seen[-1].state == pb.JOB_STATE_SUCCEEDED
        begun = min(job.blocks_done for job in seen if job.blocks_total)
        assert begun >= 2, "it began anew"
    assert terminate(process) == 0


async def test_a_service_that_is_killed_takes_its_run_along_and_the_next_one_goes_on(
    serve, directories, make_checkpoint, tmp_path
):
    make_checkpoint(num_hidden_layers=6).rename(tmp_path / "sources" / "tiny")
    process, address = serve("--listen=127.0.0.1:0", "--grace=30", *directories())
    async with open_channel(address) as channel:
        stub = QuantizerServiceStub(channel)
        job_id = (await stub.CreateJob(request(source="tiny"), timeout=10)).job.job_id
        await watch(stub, job_id, until=lambda job: job.blocks_done >= 1)
        left = children_of(process.pid)
        assert left
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive
    process, address = serve("--listen=127.0.0.1:0", *directories())
    async with open_channel(address) as channel:
        stub = QuantizerServiceStub(channel)
        seen = await watch(stub, job_id)
        assert seen[-1].state == pb.JOB_STATE_SUCCEEDED
        assert seen[-1].attempt == 2
        assert min(job.blocks_done for job in seen if job.blocks_total) >= 1
        again = (await stub.CreateJob(request(source="tiny"), timeout=10)).job
        assert again == seen[-1]
    assert read_fence(tmp_path / "artifacts" / "tiny") == 2
    assert terminate(process) == 0


def test_a_run_that_lost_its_lease_is_refused_before_it_begins(tmp_path, make_checkpoint):
    claim_fence(ArtifactStore(tmp_path / "artifacts"), "tiny", 7)
    source = make_checkpoint(num_hidden_layers=1)
    command = [sys.executable, "-m", "services.quantizer", "run", f"--source={source}", "--name=tiny"]
    command += [f"--artifacts={tmp_path / 'artifacts'}", "--fencing-token=6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == "error: tiny: fencing token 6, but 7 has been here: the lease was lost"
    )
