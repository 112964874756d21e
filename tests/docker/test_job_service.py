"""The profile `jobs`: a job over the published port, and a crash of the service in the middle of it."""

from __future__ import annotations

import json

import grpc
import pytest

from tests.docker.compose_project import ComposeProject, wait_until
from tests.docker.weft_clients import check_reachable
from weft.v1 import quantizer_service_pb2 as pb
from weft.v1.quantizer_service_pb2_grpc import QuantizerServiceStub

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
JOB_S = 420.0


def test_a_job_outlives_a_crash_of_its_service(stack: ComposeProject, measure) -> None:
    stack.compose("--profile=jobs", "up", "--detach", "--wait", "--no-deps", "jobs")
    check_reachable(stack.ports["jobs"])
    with grpc.insecure_channel(f"127.0.0.1:{stack.ports['jobs']}") as channel:
        stub = QuantizerServiceStub(channel)
        spec = pb.JobSpec(
            source="demo", name="by-job", samples=8, sequence_length=128, evaluation_tokens=2048
        )
        job_id = stub.CreateJob(pb.CreateJobRequest(request_id="a-job", spec=spec), timeout=30).job.job_id

        def job() -> pb.Job:
            request = pb.GetJobRequest(job_id=job_id)
            return stub.GetJob(request, timeout=30, wait_for_ready=True).job

        wait_until(lambda: job().blocks_done >= 2, JOB_S, "two blocks are done")
        assert job().state == pb.JOB_STATE_RUNNING
        stack.crash("jobs")
        wait_until(lambda: stack.state("jobs")["RestartCount"] == 1, 60, "restarted by its policy")
        wait_until(lambda: stack.is_healthy("jobs"), 120, "healthy again")
        ended = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
        took = wait_until(lambda: job().state in ended, JOB_S, "the job has ended")
        found = job()
        assert found.state == pb.JOB_STATE_SUCCEEDED, found
        assert found.attempt == 2
        lines = stub.GetJob(pb.GetJobRequest(job_id=job_id, include_log=True), timeout=30).log_lines
        (plan,) = (json.loads(line) for line in lines if '"event": "plan"' in line)
        assert plan["resumed_blocks"] >= 2, "it went on, and did not begin again"
        measure("job: back after the crash to published", f"{took:.1f} s")
    current = stack.execute("engine", "cat", "/artifacts/by-job/CURRENT").stdout.strip()
    assert current == found.artifact_version
    stack.compose("--profile=jobs", "stop", "jobs")
    assert stack.state("jobs")["State"]["ExitCode"] == 0
