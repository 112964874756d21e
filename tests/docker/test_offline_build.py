"""Images built with no network at all, from wheels that `make wheels` fetched before."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docker.compose_project import ComposeProject, docker

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
FILES = ["docker-compose.airgap.yml"]
TAG = "test-offline"


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
