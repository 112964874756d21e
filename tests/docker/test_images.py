"""What is in the images and in the containers made of them: little, and with little power."""

from __future__ import annotations

import json
import re

import pytest

from tests.docker.compose_project import BASE_IMAGE, ComposeProject, docker
from weft import __version__

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
SERVICES = ("quantizer", "engine", "gateway")
RUNNING = ("engine", "gateway")
# As Triton does when a kernel first runs: compiled against Python's headers, loaded from the cache.
LAUNCHER = r"""
import ctypes, os, pathlib, subprocess, sysconfig
folder = pathlib.Path(os.environ["TRITON_CACHE_DIR"]); folder.mkdir(parents=True, exist_ok=True)
source = folder / "launcher.c"
source.write_text("#include <Python.h>\n#include <dlfcn.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n")
made = folder / "launcher.so"
include = sysconfig.get_path("include")
subprocess.run(["gcc", str(source), "-O3", "-shared", "-fPIC", "-I" + include, "-o", str(made)], check=True)
print(os.getuid(), ctypes.CDLL(str(made)).answer())
"""


def python(image: str, code: str) -> str:
    done = docker("run", "--rm", "--network=none", "--entrypoint=python", image, "-c", code, check=False)
    return (done.stdout + done.stderr).strip()


def inspect_image(image: str) -> dict:
    return json.loads(docker("image", "inspect", image).stdout)[0]


def test_the_gateway_is_small_and_has_no_torch(images: dict[str, str]) -> None:
    assert inspect_image(images["gateway"])["Size"] < 300e6
    names = ("torch", "triton", "safetensors", "numpy")
    code = f"import importlib.util as u; print([name for name in {names} if u.find_spec(name)])"
    assert python(images["gateway"], code) == "[]"
    assert "torch" in python(images["engine"], code)


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_says_what_it_is_and_is_not_root(images: dict[str, str], service: str) -> None:
    config = inspect_image(images[service])["Config"]
    assert config["User"] == "10001:10001"
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["title"] == f"weft/{service}"
    assert labels["version"] == __version__
    assert labels["licenses"] == "Apache-2.0"
    assert labels["description"]


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_its_own_service_and_no_model(images: dict[str, str], service: str) -> None:
    code = (
        "import os; print(sorted(n for n in os.listdir('services') if n[0] != '_'), sorted(os.listdir('.')));"
        "print([f for t, _, fs in os.walk('/') if not t.startswith(('/proc', '/sys')) for f in fs"
        " if not t.endswith(('/python-wheels', '/ensurepip/_bundled')) and"
        " f.endswith(('.safetensors', '.whl', '.gguf')) or f == 'conftest.py' and '/app' in t])"
    )
    own, found = python(images[service], code).splitlines()
    assert own.startswith(f"['{service}'] ")
    assert not set(re.findall(r"'([^']+)'", own)) & {"models", "tests", "tools", "docs", "cli", "docker"}
    assert found == "[]"


def test_the_build_context_is_tight(project: ComposeProject, images: dict[str, str]) -> None:
    image = f"{images['gateway']}-context"
    recipe = project.checkout.parent / f"{project.checkout.name}.context"
    recipe.write_text(f"FROM {BASE_IMAGE}\nCOPY . /context\n", encoding="utf-8")
    try:
        docker("build", "--quiet", "-f", str(recipe), "-t", image, str(project.checkout), timeout_s=300)
        listed = docker("run", "--rm", image, "python", "-c", _LIST).stdout.split()
    finally:
        docker("image", "rm", "--force", image, check=False)
    tops = {name.partition("/")[0] for name in listed}
    assert tops == {"LICENSE", "constraints.txt", "docker", "pyproject.toml", "services", "weft"}
    others = [name for name in listed if name.startswith("docker/") and not name.endswith(".whl")]
    assert others == ["docker/requirements.py", "docker/wheels/.gitkeep"]


_LIST = (
    "import os\nfor top, _, files in os.walk('/context'):\n"
    "    for file in sorted(files): print(os.path.relpath(os.path.join(top, file), '/context'))"
)


def test_a_container_has_no_capability_and_cannot_get_one(stack: ComposeProject) -> None:
    for service in RUNNING:
        status = dict(
            line.split(":\t", 1)
            for line in stack.execute(service, "cat", "/proc/1/status").stdout.splitlines()
            if ":\t" in line
        )
        assert {int(status[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert status["Uid"].split() == ["10001"] * 4
        assert status["Gid"].split() == ["10001"] * 4
        assert stack.execute(service, "cat", "/proc/1/comm").stdout.strip() in ("docker-init", "tini")


@pytest.mark.parametrize(
    ("service", "allowed"), [("engine", ["/tmp", "/cache"]), ("gateway", ["/tmp", "/state"])], ids=RUNNING
)
def test_a_container_writes_where_it_must(stack: ComposeProject, service: str, allowed: list[str]) -> None:
    code = (
        "import os\n"
        "for place in ('/', '/app', '/etc', '/usr/local', '/artifacts', '/tmp', '/cache', '/state'):\n"
        "    try:\n        open(place + '/x', 'w').close(); os.unlink(place + '/x'); print(place)\n"
        "    except OSError: pass"
    )
    assert stack.execute(service, "python", "-c", code).stdout.split() == allowed
    assert stack.state(service)["HostConfig"]["ReadonlyRootfs"] is True


def test_the_engine_compiles_and_loads_a_launcher(stack: ComposeProject) -> None:
    done = stack.execute("engine", "python", "-c", LAUNCHER)
    assert done.stdout.split() == ["10001", "3"], done.stderr


def test_the_engine_compiles_its_own_kernels(stack: ComposeProject) -> None:
    """Where the processor has what they need; kept on the volume, found again by the next process."""
    code = (
        "from pathlib import Path; from services.engine.kernels import native\n"
        "has = 'avx512_bf16' in Path('/proc/cpuinfo').read_text()\n"
        "print(has, native.library(Path('/cache')) is not None, len(list(Path('/cache').glob('*.so'))))"
    )
    for _ in range(2):
        done = stack.execute("engine", "python", "-c", code)
        assert done.stdout.split() in (["True", "True", "1"], ["False", "False", "0"]), done.stderr


def test_limits_are_set(stack: ComposeProject) -> None:
    for service, memory in (("engine", 8 << 30), ("gateway", 1 << 30), ("quantizer", 8 << 30)):
        host = stack.state(service)["HostConfig"]
        assert (host["Memory"], host["PidsLimit"]) == (memory, 1024)
        assert host["Init"] is True
        assert host["Privileged"] is False
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
    assert stack.state("quantizer")["HostConfig"]["RestartPolicy"]["Name"] == "no"
    for service in RUNNING:
        assert stack.state(service)["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
        assert stack.state(service)["Config"]["StopTimeout"] == 60


def test_only_the_gateway_is_published_and_only_on_loopback(stack: ComposeProject) -> None:
    published = {
        service: [
            one["HostIp"]
            for found in stack.state(service)["NetworkSettings"]["Ports"].values()
            for one in found or ()
        ]
        for service in RUNNING
    }
    assert published == {"engine": [], "gateway": ["127.0.0.1"] * 2}


def test_the_engine_is_alone_with_the_gateway(stack: ComposeProject) -> None:
    """Nothing of the front network reaches it, and it reaches nothing outside."""
    (address,) = (one["IPAddress"] for one in stack.state("engine")["NetworkSettings"]["Networks"].values())
    code = (
        "import socket, sys\nfor target in sys.argv[1:]:\n"
        "    host, port = target.rsplit(':', 1)\n"
        "    try:\n        socket.create_connection((host, int(port)), 3).close(); print('open')\n"
        "    except OSError: print('closed')"
    )
    targets = [f"{address}:50051", f"{address}:9101", "engine:50051", "gateway:50052"]
    front = ["--rm", f"--network={stack.name}_front", "--entrypoint=python", BASE_IMAGE, "-c", code]
    assert docker("run", *front, *targets).stdout.split() == ["closed", "closed", "closed", "open"]
    outside = stack.execute("engine", "python", "-c", code, "192.0.2.1:443", "gateway:50052").stdout.split()
    assert outside == ["closed", "open"]
