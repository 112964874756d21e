"""`weft jobs`, `weft quantize` and `weft import`: against a small job service in this process, and as a
parent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import Result
from typer.testing import CliRunner

import cli.job_view
import cli.quantize
from cli.__main__ import app
from weft.v1 import quantizer_service_pb2 as pb
from weft.v1 import quantizer_service_pb2_grpc as quantizer_grpc

ROOT = Path(__file__).resolve().parents[2]


class FakeJobs(quantizer_grpc.QuantizerServiceServicer):
    """Three jobs; one succeeds, one fails, one never ends. The first watch of "restart" is cut off."""

    def __init__(self) -> None:
        self.created: list[pb.CreateJobRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.left = threading.Event()
        self.address = ""
        self.num_watches = 0
        self.words = ""

    def CreateJob(self, request: pb.CreateJobRequest, context: grpc.ServicerContext) -> pb.CreateJobResponse:
        self.created.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if request.spec.name == "full":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "100 jobs wait already")
        return pb.CreateJobResponse(job=self.job(request.spec.name, pb.JOB_STATE_QUEUED))

    def job(self, name: str, state: pb.JobState, done: int = 0) -> pb.Job:
        job = pb.Job(job_id=f"job-{name}", spec=pb.JobSpec(name=name, source="x"), state=state)
        job.message = self.words or f"block {done}"
        job.blocks_done, job.blocks_total = done, 4
        job.create_time.FromSeconds(1_790_000_000)
        if state == pb.JOB_STATE_RUNNING and done:
            job.eta_seconds = 3700.0
        if state == pb.JOB_STATE_SUCCEEDED:
            job.artifact_version = "awq-1"
        return job

    def GetJob(self, request: pb.GetJobRequest, context: grpc.ServicerContext) -> pb.GetJobResponse:
        if request.job_id == "job-none":
            context.abort(grpc.StatusCode.NOT_FOUND, "no job job-none")
        lines = ["first", "\x1b[31mred"] if request.include_log else []
        return pb.GetJobResponse(job=self.job("a", pb.JOB_STATE_RUNNING, 2), log_lines=lines)

    def ListJobs(self, request: pb.ListJobsRequest, context: grpc.ServicerContext) -> pb.ListJobsResponse:
        first = int(request.page_token or 0)
        size = min(request.page_size, 2)
        jobs = [self.job(f"n{i}", pb.JOB_STATE_RUNNING, 1) for i in range(first, min(first + size, 5))]
        return pb.ListJobsResponse(jobs=jobs, next_page_token=str(first + 2) if first + 2 < 5 else "")

    def WatchJob(
        self, request: pb.WatchJobRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchJobResponse]:
        name = request.job_id.removeprefix("job-")
        self.num_watches += 1
        context.add_callback(self.left.set)
        yield pb.WatchJobResponse(job=self.job(name, pb.JOB_STATE_RUNNING, 1))
        if name == "restart" and self.num_watches == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the service is stopping")
        if name == "endless":
            while context.is_active():
                time.sleep(0.02)
            return
        end = pb.JOB_STATE_FAILED if name == "bad" else pb.JOB_STATE_SUCCEEDED
        yield pb.WatchJobResponse(job=self.job(name, end, 4))

    def CancelJob(self, request: pb.CancelJobRequest, context: grpc.ServicerContext) -> pb.CancelJobResponse:
        job = self.job("a", pb.JOB_STATE_RUNNING, 2)
        job.cancel_requested = True
        return pb.CancelJobResponse(job=job)


@pytest.fixture
def service() -> Iterator[FakeJobs]:
    fake = FakeJobs()
    server = grpc.server(ThreadPoolExecutor(4))
    quantizer_grpc.add_QuantizerServiceServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield fake
    server.stop(None).wait()


def weft(service: FakeJobs, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--server", service.address])


def test_quantize_creates_a_job_and_follows_it(service: FakeJobs) -> None:
    words = ["quantize", "llama/8b", "--name", "good", "--group-size", "64", "--no-propagate-error"]
    words += ["--evaluation-tokens", "0", "--max-perplexity-increase", "1%", "--calibration", "a.txt"]
    done = weft(service, *words, "--request-id", "mine", "--api-key", "key")
    assert done.exit_code == 0, done.output
    (request,) = service.created
    assert request.request_id == "mine"
    assert request.spec == pb.JobSpec(
        source="llama/8b",
        name="good",
        group_size=64,
        propagate_error=False,
        evaluation_tokens=0,
        max_perplexity_increase=0.01,
        calibration=["a.txt"],
    )
    assert service.metadata[0]["authorization"] == "Bearer key"
    assert done.stdout == "good/awq-1\n"
    assert "1 of 4, about 1 h 01 min left" in done.stderr


def test_a_job_that_fails_and_one_that_is_refused(service: FakeJobs) -> None:
    failed = weft(service, "quantize", "x", "--name", "bad")
    assert failed.exit_code == 1
    assert failed.stderr.splitlines()[-1] == "weft: job-bad failed: block 4"
    refused = weft(service, "quantize", "x", "--name", "full")
    assert refused.exit_code == 1
    assert refused.stderr == "weft: RESOURCE_EXHAUSTED: 100 jobs wait already\n"


def test_detach_and_json(service: FakeJobs) -> None:
    assert weft(service, "quantize", "x", "--name", "a", "--detach").stdout == "job-a\n"
    lines = weft(service, "quantize", "x", "--name", "a", "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED"]
    ids = [request.request_id for request in service.created]
    assert len(set(ids)) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--artifacts", "/tmp"],
        ["--no-resume"],
        ["--max-perplexity-increase", "1"],
        ["--samples", "-1"],
        ["--group-size", str(1 << 40)],
    ],
)
def test_what_cannot_go_to_a_service_is_wrong_usage(service: FakeJobs, words: list[str]) -> None:
    assert weft(service, "quantize", "x", "--name", "a", *words).exit_code == 2
    assert not service.created


def test_a_service_that_restarts_is_waited_for(service: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.job_view, "_RETRY_S", 0.01)
    assert weft(service, "jobs", "watch", "job-restart").exit_code == 0
    assert service.num_watches == 2


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_cancel(service: FakeJobs) -> None:
    command = [sys.executable, "-m", "cli", "jobs", "watch", "job-endless", "--server", service.address]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "running" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "weft jobs cancel job-endless" in errors
    assert service.left.wait(10)


def test_what_a_run_wrote_is_shown_as_it_is(service: FakeJobs) -> None:
    service.words = "expected [/tmp] [red]\x1b[2J"
    assert "[/tmp]" in weft(service, "jobs", "ls").stdout.replace("\n", "")
    for words in (["jobs", "get", "job-a"], ["jobs", "cancel", "job-a"]):
        assert "expected [/tmp] [red]\\x1b[2J" in weft(service, *words).stdout
    shown = cli.job_view._follow_with_bar(iter([service.job("a", pb.JOB_STATE_FAILED)]))
    assert shown.state == pb.JOB_STATE_FAILED


def test_ls_get_and_cancel(service: FakeJobs) -> None:
    ids = [json.loads(line)["job_id"] for line in weft(service, "jobs", "ls", "--json").stdout.splitlines()]
    assert ids == [f"job-n{i}" for i in range(5)]
    assert "job-n0" in weft(service, "jobs", "ls", "--limit", "1").stdout
    got = weft(service, "jobs", "get", "job-a", "--log").stdout
    assert "running: block 2, 2 of 4" in got
    assert "\\x1b[31mred" in got
    assert "\x1b" not in got
    missing = weft(service, "jobs", "get", "job-none")
    assert (missing.exit_code, missing.stderr) == (1, "weft: NOT_FOUND: no job job-none\n")
    assert "being cancelled" in weft(service, "jobs", "cancel", "job-a").stdout


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The quantizer is a program that writes down its arguments and exits with the last one."""
    script = tmp_path / "child.py"
    script.write_text(
        "import sys, json, pathlib\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(sys.argv[2:]))\n"
        "sys.exit(int(sys.argv[-1].partition('=')[2] or 0) if sys.argv[-1].startswith('--seed') else 0)\n"
    )
    real = subprocess.Popen
    said = tmp_path / "said.json"

    def popen(command: list[str]) -> subprocess.Popen[bytes]:
        assert command[:3] == [sys.executable, "-m", "services.quantizer"]
        return real([sys.executable, str(script), str(said), *command[3:]])

    monkeypatch.setattr(cli.quantize.subprocess, "Popen", popen)
    return said


def test_without_a_server_it_is_done_here(child: Path) -> None:
    words = ["quantize", "src", "--name", "a", "--artifacts", "/vol", "--skip-indivisible", "--no-resume"]
    words += ["--calibration", "a.txt", "--calibration", "b.txt@2", "--workers=local:2", "--seed", "0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = json.loads(child.read_text())
    assert said[0] == "run"
    assert set(said[1:]) == {
        *(
            "--source=src",
            "--artifacts=/vol",
            "--name=a",
            "--skip-indivisible",
            "--calibration=a.txt:b.txt@2",
        ),
        *("--no-resume", "--workers=local:2", "--seed=0"),
    }
    done = CliRunner().invoke(app, ["quantize", "src", "--name", "a", "--artifacts", "/vol", "--seed", "3"])
    assert done.exit_code == 3, "the child's exit status is the command's"


@pytest.mark.parametrize("words", [["--json"], ["--api-key", "k"], ["--detach"], ["--request-id", "r"]])
def test_what_is_for_a_job_is_wrong_usage_here(child: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, ["quantize", "src", "--name", "a", "--artifacts", "/vol", *words])
    assert done.exit_code == 2
    assert not child.exists()


def test_import_is_done_here(child: Path) -> None:
    done = CliRunner().invoke(app, ["import", "src", "--name", "a", "--artifacts", "/vol", "--force"])
    assert done.exit_code == 0, done.output
    assert json.loads(child.read_text()) == [
        "import",
        "--source=src",
        "--artifacts=/vol",
        "--name=a",
        "--force",
    ]


def test_export_is_done_here(child: Path) -> None:
    words = ["export", "demo", "--out", "/out", "--artifacts", "/vol", "--format", "compressed-tensors"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = json.loads(child.read_text())
    assert said == [
        "export",
        "--name=demo",
        "--artifacts=/vol",
        "--out=/out",
        "--format",
        "compressed-tensors",
    ]


def test_the_volume_is_needed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEFT_ARTIFACTS", raising=False)
    assert CliRunner().invoke(app, ["quantize", "src", "--name", "a"]).exit_code == 2
    done = CliRunner().invoke(app, ["quantize", "src", "--name", "a", "--artifacts", "/v", "--detach"])
    assert done.exit_code == 2


def test_the_real_child_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "quantize", str(tmp_path / "none"), "--name", "a"]
    done = subprocess.run(
        [*command, "--artifacts", str(tmp_path / "volume")],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "no such directory" in done.stderr
    assert "Traceback" not in done.stderr
