"""The commands of the manifests, run as processes: the engine waits, the Job publishes, the gateway serves.

Only paths and ports are others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.deploy.kubernetes_manifests import ROOT, arguments, environment, main_container, manifests, one
from tests.deploy.kustomize import pod_template
from tests.deploy.running import Process

OBJECTS = manifests("cpu")
# Less work: what the flags leave open.
QUICK = {
    "WEFT_QUANTIZER_METHOD": "awq",
    "WEFT_QUANTIZER_SAMPLES": "4",
    "WEFT_QUANTIZER_EVALUATION_TOKENS": "1024",
}
LIMIT_S = 900


def words_of(kind: str, name: str, changes: dict[str, str]) -> list[str]:
    """A container's arguments, with what is different outside a cluster."""
    words = arguments(OBJECTS, main_container(one(OBJECTS, kind, name)))
    for old, new in changes.items():
        assert any(old in word for word in words), old
        words = [word.replace(old, new) for word in words]
    return words


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_job_publishes_the_engine_waits_and_the_gateway_serves(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    here = {"=/artifacts": f"={artifacts}"}
    job = [sys.executable, "-m", "services.quantizer"]
    job += words_of("Job", "quantizer", {**here, "=/models/": f"={ROOT}/models/"})
    engine_pods = pod_template(one(OBJECTS, "Deployment", "engine"))
    assert engine_pods is not None
    (wait,) = engine_pods["spec"]["initContainers"]
    shell, dash, script = wait["command"]
    script = script.replace("/artifacts/", f"{artifacts}/").replace("sleep 5", "sleep 0.2")
    waiting = subprocess.Popen(
        [shell, dash, script], env=environment(OBJECTS, wait), stdout=subprocess.DEVNULL
    )
    env = os.environ | QUICK
    try:
        first = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        assert first.returncode == 0, first.stderr[-2000:]
        assert waiting.wait(20) == 0
    finally:
        waiting.kill()
        waiting.wait()
    began = time.monotonic()
    again = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert again.returncode == 0
    assert "up to date" in again.stderr + again.stdout
    assert time.monotonic() - began < 60
    serves(here)


def serves(here: dict[str, str]) -> None:
    """Engine and gateway over what was published: a completion, and both end with 0 in their time."""
    local = {"=0.0.0.0:50051": "=127.0.0.1:0", "=0.0.0.0:9101": "=127.0.0.1:0", "=4GiB": "=64MiB"}
    engine = Process("services.engine", *words_of("Deployment", "engine", here | local)[1:])
    gateway = None
    try:
        address = engine.wait_for("serving")["address"]
        local = {"=0.0.0.0:50052": "=127.0.0.1:0", "=0.0.0.0:8080": "=127.0.0.1:0"}
        local["dns:engine:50051"] = f"dns:localhost:{address.rpartition(':')[2]}"
        gateway = Process("services.gateway", *words_of("Deployment", "gateway", here | local)[1:])
        http = gateway.wait_for("http")["address"]
        gateway.wait_for("serving")
        body = json.dumps({"model": "demo", "prompt": "Once upon a time", "max_tokens": 8}).encode()
        asked = urllib.request.Request(
            f"http://{http}/v1/completions", data=body, headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] > 0
        for name, process in (("gateway", gateway), ("engine", engine)):
            template = pod_template(one(OBJECTS, "Deployment", name))
            assert template is not None
            assert process.terminate(template["spec"]["terminationGracePeriodSeconds"]) == 0
    finally:
        engine.kill()
        if gateway is not None:
            gateway.kill()
