"""Jobs in real containers, of a small image that stands for the quantizer's. Needs a Docker engine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from docker.errors import DockerException

import docker
from weft.rpc.channel import open_channel
from weft.v1 import quantizer_service_pb2 as pb
from weft.v1.quantizer_service_pb2_grpc import QuantizerServiceStub

pytestmark = pytest.mark.docker
ROOT = Path(__file__).parents[4]
IMAGE = "weft-test/run-stub"
STUB = r"""
import json, os, socket, sys, time
options = dict(word[2:].partition("=")[::2] for word in sys.argv[2:])
def say(event, **fields):
    print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)
def can_write(path):
    try:
        open(path, "w").close()
        return True
    except OSError:
        return False
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
facts = {
    "uid": os.getuid(), "capabilities": status["CapEff"], "no_new_privileges": status["NoNewPrivs"],
    "interfaces": [name for _, name in socket.if_nameindex()],
    "writes": [path for path in ("/x", "/sources/x", "/artifacts/x", "/tmp/x") if can_write(path)],
    "sources": os.listdir(options["source"]), "offline": os.environ["HF_HUB_OFFLINE"],
}
with open("/artifacts/facts.json", "w") as file:
    json.dump(facts, file)
say("plan", blocks=2, resumed_blocks=0)
say("progress", done=1, total=3, what="block 1", seconds=0.1)
if options["name"] == "slow" and options["fencing-token"] == "1":
    time.sleep(600)
say("publishing")
say("published", version="awq-1")
print("/artifacts/" + options["name"] + "/awq-1")
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except DockerException as error:
        pytest.skip(f"no Docker engine: {error}")
    context = tmp_path_factory.mktemp("image")
    (context / "stub.py").write_text(STUB)
    (context / "Dockerfile").write_text(
        'FROM python:3.11-slim\nCOPY stub.py /stub.py\nENTRYPOINT ["python", "/stub.py"]\n'
    )
    client.images.build(path=str(context), tag=IMAGE, rm=True)
    yield client
    client.images.remove(IMAGE, force=True)
    client.close()


@pytest.fixture
def serve(engine, tmp_path):
    """serve() -> (process, address) of a service that runs jobs in containers"""
    (tmp_path / "sources" / "tiny").mkdir(parents=True)
    (tmp_path / "sources" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "artifacts").mkdir()
    os.chmod(tmp_path / "artifacts", 0o777)
    processes = []

    def start():
        flags = [f"--{name}={tmp_path / name}" for name in ("sources", "artifacts", "state")]
        flags += ["--listen=127.0.0.1:0", "--runner=docker", f"--docker-image={IMAGE}", "--grace=2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "services.quantizer", "serve", *flags, "--docker-memory=64m"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        for line in process.stderr:
            event = json.loads(line)
            if event["event"] == "serving":
                return process, event["address"]
        raise AssertionError("it did not start")

    yield start
    for process in processes:
        process.kill()
        process.communicate()
    for container in ours(engine):
        container.remove(force=True)


def ours(engine):
    return engine.containers.list(all=True, filters={"ancestor": IMAGE})


async def follow(stub, job_id, until=lambda job: False):
    call = stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=120)
    try:
        async for response in call:
            if until(response.job):
                break
    finally:
        call.cancel()
    return response.job


def request(name):
    return pb.CreateJobRequest(request_id=name, spec=pb.JobSpec(source="tiny", name=name))


async def test_a_job_runs_in_a_container_with_little_power(serve, engine, tmp_path):
    process, address = serve()
    async with open_channel(address) as channel:
        stub = QuantizerServiceStub(channel)
        job = (await stub.CreateJob(request("quick"), timeout=10)).job
        last = await follow(stub, job.job_id)
    assert (last.state, last.artifact_version) == (pb.JOB_STATE_SUCCEEDED, "awq-1"), last.message
    facts = json.loads((tmp_path / "artifacts" / "facts.json").read_text())
    assert facts == {
        "uid": 10001,
        "capabilities": "0" * 16,
        "no_new_privileges": "1",
        "interfaces": ["lo"],
        "writes": ["/artifacts/x", "/tmp/x"],
        "sources": ["config.json"],
        "offline": "1",
    }
    assert ours(engine) == []
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


async def test_a_container_is_stopped_by_a_cancel(serve, engine):
    _, address = serve()
    async with open_channel(address) as channel:
        stub = QuantizerServiceStub(channel)
        job = (await stub.CreateJob(request("slow"), timeout=10)).job
        await follow(stub, job.job_id, until=lambda job: job.blocks_done == 1)
        assert len(ours(engine)) == 1
        await stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id), timeout=10)
        assert (await follow(stub, job.job_id)).state == pb.JOB_STATE_CANCELLED
    assert ours(engine) == []


async def test_the_container_of_a_killed_service_is_ended_and_the_job_goes_on(serve, engine):
    process, address = serve()
    async with open_channel(address) as channel:
        stub = QuantizerServiceStub(channel)
        job_id = (await stub.CreateJob(request("slow"), timeout=10)).job.job_id
        await follow(stub, job_id, until=lambda job: job.blocks_done == 1)
        process.kill()
        process.wait()
    assert len(ours(engine)) == 1
    _, address = serve()
    async with open_channel(address) as channel:
        last = await follow(QuantizerServiceStub(channel), job_id)
    assert (last.state, last.attempt) == (pb.JOB_STATE_SUCCEEDED, 2), last.message
    assert ours(engine) == []
