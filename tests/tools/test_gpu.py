"""The device lane's frame: time limits, what survives a dying phase, what is written down and what is not."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results as csv_results
from tools.gpu import __main__ as lane
from tools.gpu import device_tests
from tools.gpu.phases import PHASES, Phase, PhaseResult, run_phase
from tools.gpu.report import DRY_NOTICE, number, table, write_json

ROW = {
    "benchmark": "linear",
    "case": "w4a16 8192x8192 rows=1",
    "unit": "us",
    "median": 12.345,
    "p20": 12.0,
    "p80": 13.0,
    "baseline": "cuBLAS bf16",
    "baseline_median": 40.0,
    "ratio": 3.24,
    "target": 2.8,
    "is_low_good": False,
    "status": "ok",
    "note": "",
}
MACHINE = {"device": "NVIDIA H200", "git": "abc1234", "torch": "2.11.0", "triton": "3.6.0"}


@dataclass(frozen=True, slots=True)
class Script(Phase):
    """A phase that is a few lines of Python; `OUT` is the file for its rows."""

    text: str = ""

    def command(self, is_dry: bool, seconds: float, rows: Path) -> list[str]:
        return [sys.executable, "-c", f"OUT = {str(rows)!r}\n{self.text}"]


def script(text: str) -> Script:
    return Script("probe", "", 1.0, text=text)


def test_rows_of_a_phase_that_dies_are_kept(tmp_path: Path) -> None:
    text = "open(OUT, 'a').write('{\"status\": \"ok\"}\\n{\"sta')\nprint('before')\nraise SystemExit(3)"
    result = run_phase(script(text), tmp_path, 20, is_dry=True)
    assert result.outcome == "failed"
    assert result.note == "exit code 3: before"
    assert result.rows == [{"status": "ok"}]


def test_a_phase_out_of_time_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    text = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {code!r}])\ntime.sleep(60)"
    began = time.monotonic()
    result = run_phase(script(text), tmp_path, 3, is_dry=True)
    assert result.outcome == "timeout"
    assert time.monotonic() - began < 30
    give_up_at = time.monotonic() + 5
    while _is_alive(int(child.read_text())):
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def run_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the lane with given phases and flags: (exit code, results.json)."""

    def run(
        phases: list[Phase], *flags: str, machine: dict[str, str] = MACHINE
    ) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(lane, "PHASES", tuple(phases))
        monkeypatch.setattr(lane, "machine_facts", lambda git_sha: machine)
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), *flags])
        code = lane.main()
        return code, json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def writes(row: dict[str, Any]) -> Script:
    return script(f"import json\nopen(OUT, 'a').write(json.dumps({row!r}) + '\\n')")


def test_phases_go_on_after_one_that_fails(run_lane: Callable[..., Any]) -> None:
    code, document = run_lane([script("raise SystemExit(1)"), writes(ROW)])
    assert code == 1
    assert [phase["outcome"] for phase in document["phases"]] == ["failed", "ok"]
    assert document["phases"][1]["rows"] == [ROW]
    assert document["machine"]["git"] == "abc1234"


def test_phases_without_time_are_skipped(run_lane: Callable[..., Any]) -> None:
    code, document = run_lane([writes(ROW)], "--minutes", "0.1")
    assert code == 0
    (phase,) = document["phases"]
    assert (phase["outcome"], phase["note"], phase["rows"]) == ("skipped", "out of time", [])


@pytest.mark.parametrize(
    ("flags", "machine", "reason"),
    [
        (("--dry",), MACHINE, "no measurements"),
        (("--dry",), MACHINE | {"device": "cpu"}, "no measurements"),
        ((), MACHINE | {"git": "unknown"}, "commit unknown"),
    ],
)
def test_what_is_no_measurement_is_not_written_down(
    run_lane: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    machine: dict[str, str],
    reason: str,
) -> None:
    monkeypatch.setattr(csv_results, "PATH", tmp_path / "results.csv")
    run_lane([writes(ROW)], "--write-results", *flags, machine=machine)
    assert not (tmp_path / "results.csv").exists()
    assert reason in capsys.readouterr().out


def test_without_a_device_nothing_runs(
    run_lane: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError):
        run_lane([writes(ROW)], machine=MACHINE | {"device": "cpu"})
    assert "no CUDA device" in capsys.readouterr().err


def test_measurements_are_written_with_device_and_commit(
    run_lane: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.csv"
    monkeypatch.setattr(csv_results.append, "__defaults__", (path,))
    failed = ROW | {"status": "failed", "median": None}
    for _ in range(2):
        run_lane([writes(ROW), writes(failed)], "--write-results")
    header, *lines = csv.reader(path.open())
    assert tuple(header) == csv_results.COLUMNS
    assert len(lines) == 2, "failed rows are not written, the header once"
    assert lines[0] == [
        *("gpu_linear", "w4a16 8192x8192 rows=1", "us", "12.3", "12", "13", "cuBLAS bf16", "40", "3.24"),
        *("NVIDIA H200 torch 2.11.0 triton 3.6.0", "abc1234"),
    ]
    with pytest.raises(ValueError, match="11 columns"):
        csv_results.append([("too", "few")], path)


def test_the_table_says_dry_and_shows_targets(tmp_path: Path) -> None:
    missed = ROW | {"ratio": 2.0, "case": "slow"}
    low = ROW | {"ratio": None, "median": 20.0, "target": 25.0, "is_low_good": True, "case": "low"}
    gone = ROW | {"status": "missing", "note": "no kernel", "case": "gone"}
    results = [PhaseResult("linear", "ok", 1.0, rows=[ROW, missed, low, gone])]
    text = table(results, MACHINE, is_dry=True)
    assert text.startswith(DRY_NOTICE)
    assert text.endswith(DRY_NOTICE)
    by_case = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    assert "2.8 met" in by_case["w4a16 8192x8192 rows=1"]
    assert "2.8 missed" in by_case["slow"]
    assert "25 met" in by_case["low"]
    assert "MISSING no kernel" in by_case["gone"]
    assert DRY_NOTICE not in table(results, MACHINE, is_dry=False)
    write_json(tmp_path / "r.json", MACHINE, results, is_dry=True)
    assert json.loads((tmp_path / "r.json").read_text())["notice"] == DRY_NOTICE


def test_numbers_have_three_digits() -> None:
    assert [number(n) for n in (None, 0.01234, 12.345, 999.4, 12345.6)] == [
        "",
        "0.0123",
        "12.3",
        "999",
        "12,346",
    ]


def test_the_verdicts_of_pytest_are_read_plain_and_in_parallel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (
        "tests/a/test_x.py::test_one[bf16-3] PASSED                     [ 10%]\n"
        "[gw3] [ 20%] FAILED tests/a/test_x.py::test_two \n"
        "[gw0] [ 30%] SKIPPED tests/a/test_y.py::test_z \n"
        "FAILED in prose, with no test\n"
    )
    monkeypatch.setattr(device_tests, "_pytest", lambda *_: (text, 1))
    rows = device_tests._run_each(["pytest"], 0.0)
    assert [(row["case"], row["status"], row["note"]) for row in rows] == [
        ("test_x.py", "failed", "1 passed, 1 failed: test_two"),
        ("test_y.py", "ok", "1 skipped"),
        ("all kernel tests", "ok", "1 passed of 3"),
    ]
    monkeypatch.setattr(device_tests, "_pytest", lambda *_: ("", 4))
    assert device_tests._run_each(["pytest"], 0.0)[-1]["status"] == "failed"
    monkeypatch.setattr(device_tests, "_pytest", lambda *_: (text, None))
    assert "stopped: out of time" in device_tests._run_each(["pytest"], 0.0)[-1]["note"]


def test_all_phases_fit_their_time() -> None:
    assert len({phase.name for phase in PHASES}) == len(PHASES)
    assert PHASES[1].name == "tests", "correct first"


def test_a_benchmark_refuses_the_interpreter_unless_dry(root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_phase", "machine"]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "nothing would be measured" in done.stderr


BARE = """
import importlib, os, pkgutil, sys

os.environ["TRITON_INTERPRET"] = "1"
LACKING = {"grpc", "grpc_health", "google.protobuf", "prometheus_client", "starlette", "uvicorn", "typer"}


class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name in LACKING or name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(f"a bare box has no {name}", name=name)


sys.meta_path.insert(0, Lacking())
import benchmarks
import services.engine.kernels.gpu as kernels

names = [f"benchmarks.{info.name}" for info in pkgutil.iter_modules(benchmarks.__path__)]
names = [name for name in names if name.startswith("benchmarks.gpu_")]
names += [f"services.engine.kernels.gpu.{info.name}" for info in pkgutil.iter_modules(kernels.__path__)]
names += ["services.engine.runner.device_load", "tests.services.engine.models.checkpoints"]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_a_bare_box_has_all_that_the_lane_imports(root: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", BARE], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_dry_rows_hold_no_speed(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu_phase", "machine", "--dry", "--out", str(rows)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["note"] for row in found] == ["ran", "ran"]
    assert all(row["median"] is None for row in found)
