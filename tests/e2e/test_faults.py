"""What happens when something is stopped, killed or broken in the middle."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import grpc
import pytest

from cli.demo.processes import Service, ServiceError, command_of
from tests.e2e.conftest import quantize
from tests.e2e.test_streams import read, request_of
from weft.v1 import generation_pb2 as generation

ROOT = Path(__file__).resolve().parents[2]


class Background:
    """A stream read on a thread of its own."""

    def __init__(self, stack, request, timeout=90):
        self.token_ids, self.text, self.finish, self.error = [], "", None, None
        self._call = stack.client.Generate(request, timeout=timeout)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        try:
            for event in self._call:
                if event.WhichOneof("event") == "delta":
                    self.token_ids += event.delta.token_ids
                    self.text += event.delta.text
                elif event.WhichOneof("event") == "finish":
                    self.finish = event.finish
        except grpc.RpcError as error:
            self.error = error

    def wait_for_tokens(self, count=3):
        deadline = time.monotonic() + 30
        while len(self.token_ids) < count:
            assert time.monotonic() < deadline, self.error
            time.sleep(0.01)

    def join(self):
        self._thread.join(90)
        return self


def long_request(seed=9):
    return request_of("A very long story about", seed=seed, max_tokens=400, temperature=0.9)


def test_a_gateway_told_to_stop_lets_streams_finish_and_exits_0(own_stack):
    stack = own_stack()
    stream = Background(stack, request_of("Go on", max_tokens=150, temperature=1.0))
    stream.wait_for_tokens()
    stack.gateway._process.send_signal(signal.SIGTERM)
    stream.join()
    assert stream.error is None
    assert stream.finish.reason in (generation.FINISH_REASON_LENGTH, generation.FINISH_REASON_STOP)
    assert stack.gateway._process.wait(60) == 0
    stack.wait_until_quiet()


def test_an_engine_told_to_stop_lets_streams_finish_and_exits_0(own_stack):
    stack = own_stack()
    stream = Background(stack, request_of("Go on", max_tokens=150, temperature=1.0))
    stream.wait_for_tokens()
    stack.engine._process.send_signal(signal.SIGTERM)
    stream.join()
    assert stream.error is None
    assert stream.finish.reason in (generation.FINISH_REASON_LENGTH, generation.FINISH_REASON_STOP)
    assert stack.engine._process.wait(60) == 0
    with pytest.raises(grpc.RpcError) as caught:
        read(stack.client.Generate(request_of("Anyone?"), timeout=5))
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_killed_engine_that_comes_back_changes_no_token(own_stack):
    stack = own_stack()
    expected = [read(stack.client.Generate(long_request(seed), timeout=90))[:2] for seed in range(3)]
    streams = [Background(stack, long_request(seed)) for seed in range(3)]
    for stream in streams:
        stream.wait_for_tokens(10)
    stack.engine._process.kill()
    stack.engine._process.wait()
    stack.engine = stack.start_engine(stack.engine_address)
    for stream, (text, token_ids) in zip(streams, expected, strict=True):
        stream.join()
        assert stream.error is None, stream.error
        assert (stream.text, stream.token_ids) == (text, token_ids)
    stack.wait_until_quiet()


def test_a_killed_engine_that_stays_away_ends_streams_unavailable(own_stack):
    stack = own_stack(gateway_flags=["--engine-wait-seconds", "1"])
    stream = Background(stack, long_request())
    stream.wait_for_tokens()
    stack.engine._process.kill()
    stack.engine._process.wait()
    stream.join()
    assert stream.error is not None
    assert stream.error.code() is grpc.StatusCode.UNAVAILABLE
    assert stack.gateway.is_running


def test_a_killed_gateway_leaves_no_work_behind(own_stack):
    stack = own_stack()
    stream = Background(stack, long_request())
    stream.wait_for_tokens()
    stack.gateway._process.kill()
    stream.join()
    assert stream.error.code() is grpc.StatusCode.UNAVAILABLE
    stack.wait_until_quiet(5)


def test_a_kill_during_quantization_leaves_the_old_version_serving(artifacts, tmp_path, own_stack):
    copy = tmp_path / "artifacts"
    shutil.copytree(artifacts, copy)
    current = (copy / "demo" / "CURRENT").read_text()
    flags = [
        "run",
        "--source",
        str(ROOT / "models/demo"),
        "--artifacts",
        str(copy),
        "--name",
        "demo",
        "--force",
    ]
    process = subprocess.Popen(
        command_of("quantizer", [*flags, "--samples", "8", "--sequence-length", "128", "--seed", "5"]),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if [entry for entry in (copy / "demo").iterdir() if entry.name.startswith(".")]:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (copy / "demo" / "CURRENT").read_text() == current
    stack = own_stack()
    assert read(stack.client.Generate(request_of("Still here"), timeout=30))[1]


def engine_refuses(flags, tmp_path):
    """Start an engine that must not come up; its exit code and what it said."""
    service = Service(
        "engine", command_of("engine", ["serve", "--listen", "127.0.0.1:0", *flags]), tmp_path / "logs"
    )
    try:
        with pytest.raises(ServiceError):
            service.wait_for("serving", 60)
    finally:
        if service.is_running:
            service._process.kill()
    log = service.log_path.read_text()
    assert "Traceback" not in log, log
    return service._process.wait(10), log


def test_a_changed_byte_is_refused_with_the_files_name(artifacts, tmp_path):
    copy = tmp_path / "artifacts"
    shutil.copytree(artifacts, copy)
    version = (copy / "demo" / "CURRENT").read_text().strip()
    weights = next((copy / "demo" / version).glob("*.safetensors"))
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    code, log = engine_refuses(["--artifacts", str(copy), "--model", "demo"], tmp_path)
    assert code == 1
    assert weights.name in log
    assert "sha256" in log or "digest" in log


def test_bad_models_are_refused_in_one_line(artifacts, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "models/demo", source)
    config = json.loads((source / "config.json").read_text())

    def with_config(**changes):
        (source / "config.json").write_text(json.dumps({**config, **changes}))
        return engine_refuses(["--source", str(source)], tmp_path)

    code, log = with_config(architectures=["NobodyForCausalLM"])
    assert code == 1
    assert "NobodyForCausalLM" in log
    code, log = with_config(hidden_size=128)
    assert code == 1
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:100_000])
    code, log = engine_refuses(["--source", str(source)], tmp_path)
    assert code == 1
    assert "model.safetensors" in log
    code, log = engine_refuses(["--artifacts", str(artifacts), "--model", "nobody"], tmp_path)
    assert code == 1
    assert "nobody" in log


def test_a_second_quantization_of_the_same_does_nothing(artifacts):
    before = (artifacts / "demo" / "CURRENT").read_text()
    began = time.monotonic()
    done = quantize(artifacts)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20
    assert (artifacts / "demo" / "CURRENT").read_text() == before
    assert len([entry for entry in (artifacts / "demo").iterdir() if entry.is_dir()]) == 1
