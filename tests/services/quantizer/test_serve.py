"""The job service as a process: health, reflection, keys, and an honest answer to every rpc."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

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
REQUESTS = {
    "CreateJob": pb.CreateJobRequest(request_id="a"),
    "GetJob": pb.GetJobRequest(job_id="a"),
    "ListJobs": pb.ListJobsRequest(),
    "WatchJob": pb.WatchJobRequest(job_id="a"),
    "CancelJob": pb.CancelJobRequest(job_id="a"),
}


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


async def test_every_rpc_is_unimplemented_and_says_what_to_do(serve):
    process, address = serve("--listen", "127.0.0.1:0")
    assert [check(address, name, 5.0) for name in ("", NAME)] == ["SERVING"] * 2
    assert {method.name for method in pb.DESCRIPTOR.services_by_name["QuantizerService"].methods} == set(
        REQUESTS
    )
    async with open_channel(address) as channel:
        for name, request in REQUESTS.items():
            call = getattr(QuantizerServiceStub(channel), name)(request, timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if name == "WatchJob" else call)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, name
            assert "python -m services.quantizer run" in caught.value.details()
    with grpc.insecure_channel(address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {NAME, "grpc.health.v1.Health"} <= set(services)
    assert terminate(process) == 0


async def test_keys_and_variables(serve, tmp_path):
    key = "a-key-of-a-test-0123456789"
    keys = tmp_path / "keys"
    keys.write_text(f"tester:{auth.hash_key(key)}\n")
    variables = {"WEFT_QUANTIZER_LISTEN": "127.0.0.1:0", "WEFT_QUANTIZER_API_KEY_FILE": str(keys)}
    process, address = serve(**variables)
    for given, expected in ((None, "UNAUTHENTICATED"), (key, "UNIMPLEMENTED")):
        async with open_channel(address, given) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await QuantizerServiceStub(channel).ListJobs(pb.ListJobsRequest(), timeout=10)
        assert caught.value.code().name == expected
    assert terminate(process) == 0


@pytest.mark.parametrize(
    ("flags", "status", "expected"),
    [
        (("--listen", "nowhere"), 2, "--listen"),
        (("--samples", "3"), 2, "--samples"),
        (("--api-key-file", "/nonexistent/keys"), 1, "/nonexistent/keys"),
        (("--listen", "192.0.2.1:1"), 1, "cannot listen on 192.0.2.1:1"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(flags, status, expected):
    command = [sys.executable, "-m", "services.quantizer", "serve", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == status
    assert expected in done.stderr.splitlines()[-1] or expected in done.stderr.splitlines()[-2]
    assert "Traceback" not in done.stderr
