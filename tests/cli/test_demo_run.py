"""The demo as a newcomer runs it: twice, the second time from the artifact of the first; then its faults."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", "demo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def first(data: Path) -> subprocess.CompletedProcess[str]:
    return demo("--data", str(data))


@pytest.fixture
def up(data: Path, first: object) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-m",
        "cli",
        "demo",
        "--up",
        "--listen",
        "0",
        "--http",
        "0",
        "--data",
        str(data),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "The services are up" in line:
                break
        yield process
        # In order, also when a test has failed: killed at once it would leave its services behind.
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()


def test_everything_ends_well(first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stderr
    assert "16 of 16" in first.stdout
    assert "0 active" in first.stdout
    assert re.search(r"[1-9]\d* streams went on at the", first.stdout), first.stdout
    for name in (
        "tokens/s",
        "TTFT",
        "ITL",
        "peak batch",
        "perplexity, source",
        "perplexity, 4-bit, as chosen",
    ):
        assert name in first.stdout


def test_the_second_run_starts_soon(data: Path, first: subprocess.CompletedProcess[str]) -> None:
    began = time.monotonic()
    second = demo("--data", str(data))
    assert second.returncode == 0, second.stderr
    match = re.search(r"ready after ([\d.]+) s", second.stdout)
    assert match is not None
    assert '"event": "up to date"' in second.stderr
    assert '"event": "quantizing"' not in second.stderr
    # Nothing but the start of three services; the bounds are a busy machine's.
    assert float(match[1]) < 90
    assert time.monotonic() - began < 180


def test_it_leaves_in_order_at_a_signal(up: subprocess.Popen[str]) -> None:
    children = psutil.Process(up.pid).children()
    assert len(children) == 2
    up.send_signal(signal.SIGTERM)
    assert up.wait(60) == 0
    assert not [child for child in children if child.is_running()]


def test_a_service_that_is_killed_is_told(up: subprocess.Popen[str]) -> None:
    (engine,) = [c for c in psutil.Process(up.pid).children() if "services.engine" in c.cmdline()]
    engine.kill()
    assert up.wait(60) == 1
    assert up.stderr is not None
    said = up.stderr.read()
    assert "demo: engine ended by itself" in said
    assert "last lines of" in said


def test_a_damaged_artifact_is_told_and_made_again(data: Path, first: object) -> None:
    (shard,) = (data / "artifacts").glob("demo/*/*.safetensors")
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    done = demo("--data", str(data))
    assert done.returncode == 0, done.stderr
    assert "the current artifact is damaged" in done.stderr
    assert shard.name in done.stderr
    assert shard.read_bytes() == intact
