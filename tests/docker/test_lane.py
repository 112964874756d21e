"""The lane's script with stand-ins for docker, the engine's scripts and pytest. Needs no engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docker.compose_project import BASE_IMAGE

LANE = Path(__file__).with_name("lane.sh")
ENGINE = """#!/bin/sh
here=$(dirname "$0")
echo "up ${1:-up}" >>"$here/calls"
case ${1:-up} in
  up) [ ! -e "$here/broken" ] || { echo "engine: no space left"; exit 1; }; touch "$here/alive" ;;
  env) echo "export DOCKER_HOST=unix://$here/socket" ;;
  exec) [ -e "$here/alive" ] || exit 1; shift; exec "$@" ;;
esac
"""
DOWN = """#!/bin/sh
here=$(dirname "$0"); rm -f "$here/alive"; echo down >>"$here/calls"
"""
DOCKER = """#!/bin/sh
[ -e "{place}/alive" ] || [ -e "{place}/own" ] || exit 1
echo "$*" >>"{place}/docker-calls"
case "$1 $2" in
  "image inspect"|"pull --quiet") [ ! -e "{place}/no-image" ] || {{ echo "no such image"; exit 1; }} ;;
  "network ls") echo left-over ;;
esac
"""
PYTHON = """#!/bin/sh
echo "ran $*, on $DOCKER_HOST"
[ "$2" = pip ] || echo "tests/test_x.py::test {outcome} [100%]"
[ "$2" = pip ] || exit {code}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout with the script alone, and stand-ins beside it."""
    (tmp_path / "tree" / "tests" / "docker").mkdir(parents=True)
    shutil.copy2(LANE, tmp_path / "tree" / "tests" / "docker")
    (tmp_path / "tree" / "docker" / "wheels").mkdir(parents=True)
    for name, text in (
        ("engine-up.sh", ENGINE),
        ("engine-down.sh", DOWN),
        ("docker", DOCKER.format(place=tmp_path)),
        ("python", PYTHON.format(code=0, outcome="PASSED")),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run_lane(place: Path, engine: str = "engine-up.sh") -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{place}:{os.environ['PATH']}",
        "PY": str(place / "python"),
        "WEFT_ENGINE_UP": str(place / engine),
        "DOCKER_HOST": "",
    }
    script = place / "tree" / "tests" / "docker" / "lane.sh"
    return subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text().splitlines() if (place / "calls").exists() else []


@pytest.mark.parametrize("code", [0, 1, 5])
def test_the_engine_is_taken_down_whatever_the_tests_say(place: Path, code: int) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can bring an engine up")
    (place / "python").write_text(PYTHON.format(code=code, outcome="PASSED"))
    done = run_lane(place)
    assert done.returncode == code
    assert f"pytest -m docker and not slow -v --durations=10, on unix://{place}/socket" in done.stdout
    assert calls(place)[-1] == "down"
    assert "ran -m pytest" in (place / "tree" / ".weft" / "docker-lane.log").read_text()


def test_no_engine_is_a_line_and_no_failure(place: Path) -> None:
    done = run_lane(place, "none.sh")
    assert done.returncode == 0
    assert done.stdout == "docker lane: not run: no Docker engine with compose answers\n"


def test_an_engine_that_does_not_come_up_is_a_line_and_no_failure(place: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can bring an engine up")
    (place / "broken").touch()
    done = run_lane(place)
    assert done.returncode == 0
    assert done.stdout == "docker lane: not run: no engine came up: engine: no space left\n"
    assert calls(place)[-1] == "down"


def test_an_engine_without_the_base_image_is_a_line_and_no_failure(place: Path) -> None:
    (place / "own").touch()
    (place / "no-image").touch()
    done = run_lane(place)
    assert done.returncode == 0
    assert done.stdout == f"docker lane: not run: no image {BASE_IMAGE}: no such image\n"


def test_a_run_that_skipped_everything_has_not_passed(place: Path) -> None:
    (place / "own").touch()
    (place / "python").write_text(PYTHON.format(code=0, outcome="SKIPPED"))
    done = run_lane(place)
    assert done.returncode == 1
    assert "docker lane: every test was skipped\n" in done.stdout


def test_what_a_run_that_was_cut_off_left_is_removed(place: Path) -> None:
    (place / "own").touch()
    run_lane(place)
    said = (place / "docker-calls").read_text().splitlines()
    assert "network rm left-over" in said
    assert all(
        "weft-test" in line for line in said if line.startswith(("ps ", "volume ls", "network ls", "images "))
    )


def test_an_engine_that_was_up_is_left_up(place: Path) -> None:
    (place / "alive").touch()
    done = run_lane(place)
    assert done.returncode == 0
    assert f"on unix://{place}/socket" in done.stdout
    assert not {"down", "up up"} & set(calls(place))


def test_an_engine_of_ones_own_is_used_as_it_is(place: Path) -> None:
    (place / "own").touch()
    done = run_lane(place)
    assert done.returncode == 0
    assert "ran -m pytest -m docker" in done.stdout
    assert not {"down", "up up"} & set(calls(place))
