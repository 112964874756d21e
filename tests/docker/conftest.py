"""The compose file, run: a clean checkout, its three images, one stack. Skips where no Docker engine answers.

Published ports are on 127.0.0.1 where the engine is: in its network namespace, if it has one of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docker.compose_project import BASE_IMAGE, ComposeProject, docker, removed_after

ROOT = Path(__file__).resolve().parents[2]
BUILD_S, UP_S = 1200.0, 600.0
# Real AWQ with little calibration: minutes less on two cores. What is served and how is the same.
SMALL = """
services:
  quantizer:
    environment:
      WEFT_QUANTIZER_METHOD: awq
      WEFT_QUANTIZER_SAMPLES: "8"
      WEFT_QUANTIZER_SEQUENCE_LENGTH: "128"
      WEFT_QUANTIZER_EVALUATION_TOKENS: "2048"
"""
Measure = Callable[[str, str], None]


@pytest.fixture(scope="session")
def measure(request: pytest.FixtureRequest) -> Measure:
    """measure(what, value): a line in the log of the run, whatever pytest captures."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(what: str, value: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"measured: {what}: {value}")

    return write


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Skips unless an engine and compose answer and the base image is there or can be had."""
    if shutil.which("docker") is None:
        pytest.skip("no docker command")
    for words in (["version"], ["compose", "version"]):
        done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            pytest.skip(f"docker {' '.join(words)}: {' '.join(done.stderr.split())[:200]}")
    if docker("image", "inspect", BASE_IMAGE, check=False).returncode != 0:
        pulled = docker("pull", "--quiet", BASE_IMAGE, check=False, timeout_s=300)
        if pulled.returncode != 0:
            pytest.skip(f"no image {BASE_IMAGE}: {' '.join(pulled.stderr.split())[:200]}")


@pytest.fixture(scope="session")
def clean_copy(
    docker_engine: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """clean_copy(name): a new directory with what the last commit holds, and nothing else. Gone in the end:
    wheels of hundreds of megabytes come to lie in it.
    """
    made: list[Path] = []

    def make(name: str) -> Path:
        target = tmp_path_factory.mktemp(name)
        archive = target.with_suffix(".tar")
        command = ["git", "archive", f"--output={archive}", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            pytest.skip(f"not a git checkout: {done.stderr.strip()}")
        with tarfile.open(archive) as packed:
            packed.extractall(target, filter="data")
        archive.unlink()
        target.chmod(0o755)
        made.append(target)
        return target

    yield make
    for target in made:
        shutil.rmtree(target, ignore_errors=True)


@pytest.fixture(scope="session")
def checkout(clean_copy: Callable[[str], Path]) -> Path:
    """A clean checkout, with torch in docker/wheels: the build's other packages come from the index."""
    target = clean_copy("checkout")
    wheels = target / "docker" / "wheels"
    found = sorted((ROOT / "docker" / "wheels").glob("torch-2.13.0*.whl"))
    if found:
        shutil.copy2(found[0], wheels)
    else:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "torch==2.13.0",
            "-d",
            wheels,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            pytest.skip(f"no wheel of torch: {done.stderr[-300:]}")
    return target


@pytest.fixture(scope="session")
def project(checkout: Path) -> Iterator[ComposeProject]:
    """The compose project, images built, nothing started."""
    tag = f"test-{uuid.uuid4().hex[:8]}"
    override = checkout / "docker-compose.small.yml"
    override.write_text(SMALL, encoding="utf-8")
    environment = {"WEFT_IMAGES": "weft-test", "WEFT_TAG": tag, "TORCH_INDEX": ""}
    made = ComposeProject(checkout, f"weft-{tag}", environment, [override])
    with removed_after(made):
        yield made
    for service in ("quantizer", "engine", "gateway"):
        docker("image", "rm", "--force", f"weft-test/{service}:{tag}", check=False)


@pytest.fixture(scope="session")
def images(project: ComposeProject, measure: Measure) -> dict[str, str]:
    """Service -> image, built from the checkout."""
    begin = time.monotonic()
    project.compose("build", timeout_s=BUILD_S)
    measure("build of three images (with what the cache had)", f"{time.monotonic() - begin:.0f} s")
    tag = project.name.removeprefix("weft-")
    names = {service: f"weft-test/{service}:{tag}" for service in ("quantizer", "engine", "gateway")}
    for service, name in names.items():
        size = int(docker("image", "inspect", name, "--format={{.Size}}").stdout)
        measure(f"image {service}", f"{size / 1e6:.0f} MB")
    return names


@pytest.fixture(scope="session")
def stack(project: ComposeProject, images: dict[str, str], measure: Measure) -> ComposeProject:
    """The stack after its first `docker compose up`: the demo model quantized and served."""
    begin = time.monotonic()
    project.compose("up", "--detach", "--wait", timeout_s=UP_S)
    measure("first up to healthy, quantizing included", f"{time.monotonic() - begin:.1f} s")
    return project
