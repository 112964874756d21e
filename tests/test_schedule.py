"""Every test runs once, in pieces that are whole files, in the order that keeps the cores busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("xdist")

from tests.schedule import COMPUTING, MAX_WORKERS, ONE_PIECE, WAITING, ScheduleByFile, num_workers, piece_of

ROOT = Path(__file__).resolve().parents[1]
COMPUTES = ["tests/services/quantizer/test_a.py", "tests/services/engine/kernels/gpu/test_b.py"]
WAITS = ["tests/hostile/test_c.py", "tests/e2e/test_d.py", "tests/e2e/test_e.py"]
REST = ["tests/weft/test_f.py", "tests/architecture/test_g.py"]


class Worker:
    """Keeps what it is told to run."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.told: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.told += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def begin(pytestconfig: pytest.Config, monkeypatch: Any, files: list[str], num: int) -> Any:
    """A schedule that has begun, its workers, and the tests: four a file."""
    monkeypatch.setattr(pytestconfig.option, "tx", [f"{num}*popen"], raising=False)
    monkeypatch.setattr(pytestconfig.option, "numprocesses", num, raising=False)
    tests = [f"{file}::test_{i}[a::b]" for file in files for i in range(4)]
    schedule = ScheduleByFile(pytestconfig)
    workers = [Worker(f"gw{i}") for i in range(num)]
    for worker in workers:
        schedule.add_node(worker)  # type: ignore[arg-type]
    for worker in workers:
        schedule.add_node_collection(worker, tests)  # type: ignore[arg-type]
    schedule.schedule()
    return schedule, workers, tests


def finish(schedule: Any, workers: list[Worker]) -> None:
    """Every worker runs what it is told, the last of them the fastest."""
    done = {worker.gateway.id: 0 for worker in workers}
    while any(done[w.gateway.id] < len(w.told) for w in workers):
        for worker in reversed(workers):
            if (place := done[worker.gateway.id]) < len(worker.told):
                done[worker.gateway.id] += 1
                schedule.mark_test_complete(worker, worker.told[place])


def test_every_test_runs_once_and_a_file_in_one_worker(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, workers, tests = begin(pytestconfig, monkeypatch, [*COMPUTES, *REST, *WAITS], 3)
    finish(schedule, workers)
    assert sorted(index for worker in workers for index in worker.told) == list(range(len(tests)))
    places = [{piece_of(tests[index]) for index in worker.told} for worker in workers]
    assert sum(map(len, places)) == len(set().union(*places))
    assert schedule.tests_finished
    assert all(worker.shutting_down for worker in workers)


def test_one_worker_waits_first_and_the_others_compute_first(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, workers, tests = begin(pytestconfig, monkeypatch, [*REST, *COMPUTES, *WAITS], 2)
    begun = [list(dict.fromkeys(piece_of(tests[index]) for index in worker.told)) for worker in workers]
    assert begun == [["tests/e2e/"], [COMPUTES[1]]]
    finish(schedule, workers)
    begun = [list(dict.fromkeys(piece_of(tests[index]) for index in worker.told)) for worker in workers]
    assert begun[0][:2] == ["tests/e2e/", WAITS[0]]
    assert begun[1][:2] == [COMPUTES[1], COMPUTES[0]]


def test_what_a_dead_worker_left_runs_elsewhere(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, workers, tests = begin(pytestconfig, monkeypatch, [*COMPUTES, *REST, *WAITS], 2)
    crashed = schedule.remove_node(workers[0])
    assert crashed == tests[workers[0].told[0]]
    finish(schedule, workers[1:])
    assert sorted(workers[1].told) == list(range(len(tests)))


def test_the_folders_exist_and_none_is_hidden_by_another() -> None:
    for folder in (*WAITING, *COMPUTING, *ONE_PIECE):
        assert (ROOT / folder).is_dir(), folder
    for folders in (WAITING, COMPUTING):
        for place, folder in enumerate(folders):
            assert not folder.startswith(folders[:place]), folder


def test_workers() -> None:
    assert [num_workers(cores) for cores in (1, 2, 4, 64)] == [2, 3, 5, MAX_WORKERS]


def copy_of_conftest(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")


def run_pytest(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), *flags]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("body", "what"),
    [("os._exit(1)", "crashed while running"), ("pass", "Different tests were collected")],
)
def test_a_run_that_left_tests_out_has_not_just_failed_some(tmp_path: Path, body: str, what: str) -> None:
    """Exit code 1 would let the failures alone be run again, and all the others never."""
    copy_of_conftest(tmp_path)
    differing = f"@pytest.mark.parametrize('i', [os.getpid() if {body == 'pass'} else 0])\n"
    (tmp_path / "test_a.py").write_text(f"import os, pytest\n{differing}def test(i): {body}\n")
    for name in "bcdefgh":
        (tmp_path / f"test_{name}.py").write_text(
            "import pytest\n@pytest.mark.parametrize('i', range(3))\ndef test(i): pass\n"
        )
    done = run_pytest(tmp_path, "-n", "2", "--max-worker-restart", "0")
    assert what in done.stdout, done.stdout
    assert "not every test was run" in done.stdout
    assert done.returncode == pytest.ExitCode.INTERNAL_ERROR


@pytest.mark.parametrize(("code", "is_tried"), [(0, False), (1, True), (2, False), (3, False), (5, False)])
def test_only_what_failed_in_a_whole_run_is_run_again(tmp_path: Path, code: int, is_tried: bool) -> None:
    python = tmp_path / "python"
    lines = ["#!/bin/sh", 'echo "$*" >>calls', 'case "$*" in *last-failed*) exit 0 ;; esac', f"exit {code}"]
    python.write_text("\n".join(lines))
    python.chmod(0o755)
    # What a make around this test was told is not for this one.
    told = ("MAKE", "RETEST", "WORKERS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(told)}

    def make(*words: str) -> bool:
        command = ["make", "-f", ROOT / "Makefile", "test", f"PY={python}", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        return done.returncode == 0

    assert make("RETEST=1") is (code in (0, 1))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "-m pytest -n auto"
    assert ["--last-failed" in call for call in calls[1:]] == [True] * is_tried
    assert make() is (code == 0)


def test_a_report_that_is_no_utf8_ends_no_worker(tmp_path: Path) -> None:
    copy_of_conftest(tmp_path)
    (tmp_path / "test_a.py").write_text(
        "import logging, pytest\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "def test(i):\n"
        "    logging.error('half \\ud800')\n"
        "    assert i != 1, 'half \\ud800'\n"
    )
    done = run_pytest(tmp_path, "-n", "2")
    assert "1 failed, 2 passed" in done.stdout, done.stdout
    assert "half \\ud800" in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED


def test_pytest_asks_for_the_schedule_and_remembers_failures_by_their_plain_names(tmp_path: Path) -> None:
    """The whole of it: two workers, one failure, and a second run of that failure alone."""
    copy_of_conftest(tmp_path)
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(
            "import json, os, pathlib, pytest\n"
            "@pytest.mark.parametrize('i', range(5))\n"
            "def test(i, testrun_uid):\n"
            "    with open('seen', 'a') as f: f.write(json.dumps([__name__, i, os.environ['OMP_NUM_THREADS'],"
            " os.environ['PYTEST_XDIST_WORKER']]) + '\\n')\n"
            "    assert (__name__, i) != ('test_b', 3)\n"
        )

    done = run_pytest(tmp_path, "-n", "2")
    assert "1 failed, 9 passed" in done.stdout, done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len({(name, i) for name, i, *_ in seen}) == len(seen) == 10
    assert {threads for *_, threads, _ in seen} == {"1"}
    for name in ("test_a", "test_b"):
        assert len({worker for file, _, _, worker in seen if file == name}) == 1
    last = json.loads((tmp_path / ".pytest_cache/v/cache/lastfailed").read_text())
    assert last == {"test_b.py::test[3]": True}
    output = run_pytest(tmp_path, "--last-failed", "--collect-only").stdout
    assert "test_b.py::test[3]" in output
    assert output.count("::") == 1
