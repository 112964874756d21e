"""Images built with no network at all, from wheels that `make wheels` fetched before."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docker.compose_project import BASE_IMAGE, ComposeProject, docker

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
FILES = ["docker-compose.airgap.yml"]
TAG = "test-offline"
IMPORTS = {
    "gateway": "services.gateway.serve",
    "quantizer": "torch, services.quantizer.quantize",
    "engine": "torch, services.engine.serve",
}
"""Service -> what must be importable in its image."""
COMPILER_BASE = "weft-test/base-with-compiler:local"


@pytest.fixture(scope="module")
def offline(clean_copy: Callable[[str], Path]) -> ComposeProject:
    environment = {"WEFT_IMAGES": "weft-test", "WEFT_TAG": TAG}
    return ComposeProject(clean_copy("offline"), "weft-test-offline", environment, FILES)


def test_without_wheels_nothing_is_fetched(offline: ComposeProject) -> None:
    """With an index this would pass."""
    done = offline.compose("build", "gateway", check=False)
    assert done.returncode != 0
    assert "pip install --find-links /wheels" in done.stderr.strip().splitlines()[-1]


def test_the_gateway_is_built_from_its_wheels(offline: ComposeProject, measure) -> None:
    begin = time.monotonic()
    command = ["make", "wheels", f"PY={sys.executable}", "WHEELS_FOR=gateway"]
    done = subprocess.run(command, cwd=offline.checkout, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    measure("make wheels, for the gateway", f"{time.monotonic() - begin:.0f} s")
    begin = time.monotonic()
    try:
        offline.compose("build", "gateway", timeout_s=900)
        measure("build of the gateway without a network", f"{time.monotonic() - begin:.0f} s")
        image = f"weft-test/gateway:{TAG}"
        shown = docker("run", "--rm", "--network=none", image, "serve", "--help").stdout
        assert "--engine-wait-seconds" in shown
    finally:
        docker("image", "rm", "--force", f"weft-test/gateway:{TAG}", check=False)


@pytest.fixture
def compiler_base(docker_engine: None) -> Iterator[str]:
    """What python:3.11-bookworm is and the slim base is not: with a C compiler and Python's headers."""
    install = "apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev"
    dockerfile = f"FROM {BASE_IMAGE}\nRUN {install}\n"
    build = ["docker", "build", "--tag", COMPILER_BASE, "-"]
    done = subprocess.run(build, input=dockerfile, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    yield COMPILER_BASE
    docker("image", "rm", "--force", COMPILER_BASE, check=False)


@pytest.mark.slow
def test_all_images_are_built_from_their_wheels(
    clean_copy: Callable[[str], Path], compiler_base: str, measure
) -> None:
    environment = {"WEFT_IMAGES": "weft-test", "WEFT_TAG": TAG, "PYTHON_IMAGE": compiler_base}
    offline = ComposeProject(clean_copy("offline-all"), "weft-test-offline-all", environment, FILES)
    begin = time.monotonic()
    command = ["make", "wheels", f"PY={sys.executable}"]
    done = subprocess.run(command, cwd=offline.checkout, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    measure("make wheels, for all images", f"{time.monotonic() - begin:.0f} s")
    try:
        for service, modules in IMPORTS.items():
            begin = time.monotonic()
            offline.compose("build", service, timeout_s=1200)
            measure(f"build of the {service} without a network", f"{time.monotonic() - begin:.0f} s")
            image = f"weft-test/{service}:{TAG}"
            python = ["run", "--rm", "--network=none", "--entrypoint=python", image, "-c"]
            docker(*python, f"import {modules}", timeout_s=300)
            if service == "engine":
                docker(*python, "import subprocess; subprocess.run(['gcc', '--version'], check=True)")
    finally:
        for service in IMPORTS:
            docker("image", "rm", "--force", f"weft-test/{service}:{TAG}", check=False)
