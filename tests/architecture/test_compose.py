"""What the compose file and the Dockerfiles promise; `docker compose config` where compose is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.quantizer.serve import ServeConfig
from weft import __version__

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("quantizer", "engine", "gateway")
# Compose service -> the folder of services/ whose image it runs.
BASE = "python:3.11-slim-bookworm"
IMAGES = {"jobs": "quantizer"} | {service: service for service in SERVICES}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


KNOWN_KEYS = {
    "": "name services volumes networks x-manners x-torch x-gpu x-airgap",
    "service": "profiles build image command environment restart init read_only cap_drop security_opt "
    "pids_limit mem_limit logging stop_grace_period depends_on healthcheck networks ports tmpfs volumes "
    "deploy",
    "build": "context dockerfile args network",
    "healthcheck": "test interval timeout retries start_period",
}


@pytest.mark.parametrize(
    "name", ["docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.airgap.yml"]
)
def test_every_key_is_one_that_compose_knows(name: str) -> None:
    """What compose itself would refuse, for machines without it: a misspelt key changes nothing silently."""
    loaded = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    found = [("", loaded)]
    for settings in loaded["services"].values():
        found += [("service", settings), ("build", settings.get("build", {}))]
        found.append(("healthcheck", settings.get("healthcheck", {})))
    for kind, keys in found:
        assert not set(keys) - set(KNOWN_KEYS[kind].split()), kind
    for settings in loaded["services"].values():
        assert set(settings.get("networks", [])) <= set(loaded.get("networks", {}))
        named = {volume.split(":")[0] for volume in settings.get("volumes", []) if volume[0] not in "./"}
        assert named <= set(loaded.get("volumes", {}))


def dockerfile(service: str) -> str:
    return (ROOT / "services" / service / "Dockerfile").read_text(encoding="utf-8")


def test_services_start_in_order(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(IMAGES) <= set(services)
    profiles = {name: settings["profiles"] for name, settings in services.items() if "profiles" in settings}
    assert profiles.pop("jobs") == ["jobs"]
    assert set(profiles) == set(services) - set(IMAGES), "nothing else starts unless it is asked for"
    assert all(profile == ["observe"] for profile in profiles.values())
    assert "depends_on" not in services["jobs"]
    assert "depends_on" not in services["quantizer"]
    assert services["engine"]["depends_on"] == {"quantizer": {"condition": "service_completed_successfully"}}
    assert services["gateway"]["depends_on"] == {"engine": {"condition": "service_healthy"}}
    assert services["quantizer"]["restart"] == "no"


@pytest.mark.parametrize("service", IMAGES)
def test_every_service_runs_with_little_power(compose: dict[str, Any], service: str) -> None:
    settings = compose["services"][service]
    assert settings["init"] is True
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["tmpfs"]
    assert re.fullmatch(r"\d+s", settings["stop_grace_period"])
    assert not {"privileged", "network_mode", "pid", "cap_add", "user"} & settings.keys()


def test_what_clients_talk_to_is_published_and_only_here(compose: dict[str, Any]) -> None:
    published = {name: s["ports"] for name, s in compose["services"].items() if s.get("ports")}
    assert {"gateway", "jobs"} <= set(published)
    assert "engine" not in published
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert compose["services"]["engine"]["networks"] == ["back"]
    assert compose["networks"]["back"] == {"internal": True}


def test_only_the_quantizer_writes_the_volume(compose: dict[str, Any]) -> None:
    assert "artifacts" in compose["volumes"]
    mounts = {name: s["volumes"] for name, s in compose["services"].items()}
    assert "artifacts:/artifacts" in mounts["quantizer"]
    assert mounts["engine"] == ["artifacts:/artifacts:ro", "cache:/cache"]
    assert "/cache" in dockerfile("engine")
    assert mounts["gateway"] == ["artifacts:/artifacts:ro", "sessions:/state"]
    assert "--sessions=/state/sessions.db" in compose["services"]["gateway"]["command"]
    assert mounts["jobs"] == ["artifacts:/artifacts", "jobs:/state", "./models:/models:ro"]
    assert [name for name, found in mounts.items() if any(m.startswith("jobs:") for m in found)] == ["jobs"]
    state = next(word for word in compose["services"]["jobs"]["command"] if word.startswith("--state="))
    assert state == "--state=/state", "never on the artifact volume"
    for image in ("quantizer", "gateway"):
        assert "/state" in dockerfile(image), "its owner must be the user of the image"


@pytest.mark.parametrize("service", ["engine", "gateway", "jobs"])
def test_health_is_the_products_own_probe(compose: dict[str, Any], service: str) -> None:
    settings = compose["services"][service]
    command, module = settings["healthcheck"]["test"][:3], settings["healthcheck"]["test"][3]
    assert (command, module) == (["CMD", "python", "-m"], "weft.rpc.healthcheck")
    host, _, port = settings["healthcheck"]["test"][4].rpartition(":")
    assert host == "127.0.0.1"
    assert f"--listen=0.0.0.0:{port}" in settings["command"]


def test_the_gateway_calls_the_engine_where_it_listens(compose: dict[str, Any]) -> None:
    assert "--engine=dns:engine:50051" in compose["services"]["gateway"]["command"]
    assert "--listen=0.0.0.0:50051" in compose["services"]["engine"]["command"]


@pytest.mark.parametrize("service", IMAGES)
def test_commands_are_the_services_own(compose: dict[str, Any], gpu: dict[str, Any], service: str) -> None:
    """Every flag and variable that the compose files pass is one that the service's own help lists."""
    verb, *rest = compose["services"][service]["command"]
    passed = {word.partition("=")[0] for word in rest if word.startswith("--")}
    for file in (compose, gpu):
        environment = file["services"].get(service, {}).get("environment", {})
        passed |= {name for name in environment if name.startswith("WEFT_")}
    command = [sys.executable, "-m", f"services.{IMAGES[service]}", verb, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert not passed - set(re.findall(r"--[a-z-]+|WEFT_[A-Z_]+", shown.stdout))


@pytest.mark.parametrize("service", SERVICES)
def test_dockerfiles_are_small_and_not_root(service: str) -> None:
    text = dockerfile(service)
    assert "\nUSER 10001:10001\n" in text
    assert re.findall(r"^FROM (.+)$", text, re.M) == ["scratch AS wheels", "${PYTHON_IMAGE}"]
    assert re.findall(r"^ARG PYTHON_IMAGE=(.+)$", text, re.M) == [BASE]
    assert "# syntax" not in text
    assert f'org.opencontainers.image.version="{__version__}"' in text
    copied = re.findall(r"^COPY (services/\S+)", text, re.M)
    assert copied == ["services/__init__.py", f"services/{service}"], "an image holds its own service alone"
    assert all(
        (ROOT / name).exists() for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()
    )


def test_the_gateway_image_holds_no_torch_and_the_engine_a_compiler() -> None:
    assert "torch" not in re.sub(r"^#.*$", "", dockerfile("gateway"), flags=re.M)
    assert {"gcc", "libc6-dev"} <= set(dockerfile("engine").split())


@pytest.mark.parametrize(("extra", "has_torch"), [("gateway", False), ("engine", True), ("quantizer", True)])
def test_requirements_of_an_image(extra: str, has_torch: bool) -> None:
    script = ROOT / "docker" / "requirements.py"
    done = subprocess.run(
        [sys.executable, script, ROOT / "pyproject.toml", extra], check=True, capture_output=True, text=True
    )
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in done.stdout.splitlines()}
    assert "grpcio" in names
    assert ("torch" in names) is has_torch


def test_the_gpu_file_reserves_a_device_for_known_services(gpu: dict[str, Any]) -> None:
    assert set(gpu["services"]) == {"quantizer", "jobs", "engine"}
    for settings in gpu["services"].values():
        (device,) = settings["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


OVERRIDES = [
    ["docker-compose.yml"],
    ["docker-compose.yml", "docker-compose.gpu.yml"],
    ["docker-compose.yml", "docker-compose.airgap.yml"],
]


@pytest.mark.parametrize("files", OVERRIDES)
def test_compose_reads_it(files: list[str]) -> None:
    assert compose_config(files)["name"] == "weft"


def test_the_gpu_override_reserves_and_sets_the_device() -> None:
    """As compose merges the files, not as they are written."""
    services = compose_config(["docker-compose.yml", "docker-compose.gpu.yml"], "--profile=jobs")["services"]
    for name, variable in (("engine", "WEFT_ENGINE_DEVICE"), ("quantizer", "WEFT_QUANTIZER_DEVICE")):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
        assert services[name]["environment"][variable] == "cuda"
        assert services[name]["build"]["args"]["TORCH_INDEX"] == ""
        assert services[name]["read_only"] is True, "what the override does not name stays"
    assert services["jobs"]["environment"] == {"WEFT_QUANTIZER_DEVICES": "cuda:0"}
    assert "deploy" not in services["gateway"]


def test_the_override_for_no_network_covers_every_build() -> None:
    services = compose_config(["docker-compose.yml", "docker-compose.airgap.yml"], "--profile=*")["services"]
    builds = {name: settings["build"] for name, settings in services.items() if "build" in settings}
    assert set(builds) == set(IMAGES)
    for build in builds.values():
        assert build["network"] == "none"
        assert build["args"]["PIP_NO_INDEX"] == "1"
        assert not build["args"].get("TORCH_INDEX")


def test_images_are_named_by_their_version(compose: dict[str, Any], gpu: dict[str, Any]) -> None:
    for name, image in IMAGES.items():
        found = compose["services"][name]["image"]
        assert found == f"${{WEFT_IMAGES:-weft}}/{image}:${{WEFT_TAG:-{__version__}}}"
        if name in gpu["services"]:
            assert gpu["services"][name]["image"] == f"{found}-cuda", "another torch: not the same image"
    for name, settings in compose["services"].items():
        tag = settings["image"].rpartition(":")[2].strip("}-")
        assert tag, f"{name}: an image without a tag is the latest"
        assert "latest" not in settings["image"], name


def test_the_job_service_starts_the_image_that_is_built() -> None:
    """With `--runner docker`: a name without a tag would be the latest, which no build makes."""
    (default,) = (field.default for field in fields(ServeConfig) if field.name == "docker_image")
    assert default == f"weft/quantizer:{__version__}"


def test_the_engine_and_the_quantizer_share_a_torch() -> None:
    """The same words up to torch are one layer: built, stored and pulled once."""
    shared = [
        re.search(r"^FROM \$\{.*?-c constraints.txt torch$", dockerfile(s), re.M | re.S) for s in SERVICES[:2]
    ]
    first, second = (found.group() for found in shared if found)
    assert first == second


def test_a_build_sees_only_what_is_named() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")]
    assert lines[0] == "*", "everything is out"
    needed = {
        name.split("/")[0] if not name.startswith("docker/") else name
        for service in SERVICES
        for line in re.findall(r"^COPY (.+) \S+$", dockerfile(service), re.M)
        for name in line.split()
    }
    assert {line[1:] for line in lines if line[0] == "!"} == needed


def compose_config(files: list[str], *flags: str) -> dict[str, Any]:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker compose is not installed")
    words = [word for name in files for word in ("-f", name)]
    # A caller's own settings are none of this test's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WEFT_", "TORCH_", "PYTHON_I"))}
    done = subprocess.run(
        [docker, "compose", *words, *flags, "config", "--format=json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert isinstance(loaded, dict)
    return loaded
