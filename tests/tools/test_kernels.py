"""The compile lane on launches of its own: what holds passes, and each broken gate is told by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SAMPLE = Path(__file__).with_name("sample_kernels.py")


def run(root: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m tools.kernels` in a process without TRITON_INTERPRET, which the kernel tests set."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tools.kernels", *map(str, arguments)],
        cwd=root,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """The sample, compiled for all architectures once: (name, arch) -> what the JSON says."""
    folder = tmp_path_factory.mktemp("kernels")
    root = Path(__file__).resolve().parents[2]
    out = folder / "facts.json"
    done = run(root, SAMPLE, "--json", out, "--cache", folder / "cache", "--listing", folder / "listing")
    assert done.returncode == 1, done.stderr
    (folder / "text").write_text(done.stdout + done.stderr)
    cases = json.loads(out.read_text())["cases"]
    assert (folder / "listing" / "good_sum.sm_90.sass").stat().st_size > 1000
    return {(case["name"], case["arch"]): case for case in cases}


def test_what_holds_has_no_complaint_and_the_right_count(reports: dict[tuple[str, int], Any]) -> None:
    case = reports["good/product", 90]
    assert case["failures"] == []
    assert case["tensor_core"].keys() == {"HGMMA"}
    assert case["spills"] == 0
    assert 0 < case["registers"] <= 255
    assert case["resident_blocks"] >= 1
    loop = case["main_loop"]
    assert loop["per_element"] == loop["num_instructions"] * 128 / (64 * 64)
    assert loop["num_instructions"] == sum(loop["opcodes"].values()) - loop["opcodes"].get("NOP", 0)
    assert reports["good/product", 100]["tensor_core"].keys() == {"UTCHMMA"}


def test_a_skip_needs_a_reason_and_shows_it(reports: dict[tuple[str, int], Any]) -> None:
    assert reports["good/product", 80]["remarks"] == ["skipped: no such type there"]
    assert reports["good/product", 80]["failures"] == []
    assert reports["good/sum", 80]["skipped"] is None
    assert reports["good/sum", 80]["registers"] > 0


def test_a_loop_that_the_assembler_unrolls_counts_once(reports: dict[tuple[str, int], Any]) -> None:
    """ptxas repeats the row sum's short body; per element it stays a few instructions."""
    loop = reports["good/sum", 90]["main_loop"]
    assert loop["unroll"] > 1
    assert loop["per_element"] == loop["num_instructions"] * 128 / (512 * loop["unroll"])
    assert 1 < loop["per_element"] < 3


@pytest.mark.parametrize(
    ("name", "arch", "complaint"),
    [
        ("bad/spills", 90, "spill instructions"),
        ("bad/no_tensor_core", 90, "no tensor-core instruction"),
        ("bad/too_long", 90, "instructions per element, gate 0.1"),
        ("bad/shared_memory", 90, "bytes of shared memory, a block has 232448"),
        ("bad/shared_memory", 80, "bytes of shared memory, a block has 166912"),
        ("bad/no_figure", 90, "without elements_per_iteration"),
        ("bad/arguments", 90, "missing arguments ['num_rows', 'out_ptr']"),
        ("bad/arguments", 80, "missing arguments"),
    ],
)
def test_every_broken_gate_is_named(
    reports: dict[tuple[str, int], Any], name: str, arch: int, complaint: str
) -> None:
    (failure,) = reports[name, arch]["failures"]
    assert complaint in failure


def test_gates_of_speed_hold_on_one_architecture_only(reports: dict[tuple[str, int], Any]) -> None:
    for name in ("bad/spills", "bad/too_long", "bad/no_tensor_core"):
        assert reports[name, 80]["failures"] == [], name
    assert any("spill" in remark for remark in reports["bad/spills", 80]["remarks"])
    assert reports["ungated/spills", 90]["failures"] == []
    assert reports["ungated/spills", 90]["spills"] == reports["bad/spills", 90]["spills"] > 0


def test_a_second_run_reads_what_is_kept_and_a_changed_kernel_is_compiled(root: Path, tmp_path: Path) -> None:
    file, cache = tmp_path / "changing.py", tmp_path / "cache"
    text = SAMPLE.read_text()
    file.write_text(text)
    only = ("--only", "good/sum", "--arch", 90, "--cache", cache)
    first = run(root, file, *only)
    assert first.returncode == 0, first.stderr
    (kept,) = cache.iterdir()
    facts = json.loads(kept.read_text())
    kept.write_text(json.dumps(facts | {"registers": 7}))
    assert " 7 " in run(root, file, *only).stdout, "the second run reads the first one's result"
    file.write_text(text.replace("acc += tl.load(", "acc += 2 * tl.load("))
    assert " 7 " not in run(root, file, *only).stdout
    assert len(list(cache.iterdir())) == 2


def test_the_interpreter_is_refused(root: Path, tmp_path: Path) -> None:
    done = run(root, SAMPLE, "--cache", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
    assert not done.stdout


def test_what_cannot_be_found_fails(root: Path, tmp_path: Path) -> None:
    done = run(root, SAMPLE, "--only", "no such launch", "--cache", tmp_path)
    assert done.returncode == 1
    assert "no case to compile among 9" in done.stderr
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    done = run(root, broken, SAMPLE, "--only", "good/sum", "--arch", 90, "--cache", tmp_path)
    assert done.returncode == 1
    assert "No module named 'nothing_of_that_name'" in done.stderr
    assert "good/sum" in done.stdout, "a broken module does not keep the others from being compiled"


DEADLY = """

import os


class Deadly(dict):
    def get(self, *_):
        os.write(2, b"fatal error: told on stderr\\n")
        os._exit(9)


def compile_cases():
    return [row_sum("lives"), row_sum("dies", notes=Deadly()), row_sum("lives too")]
"""


def test_a_compiler_that_dies_is_told_by_name(root: Path, tmp_path: Path) -> None:
    deadly = tmp_path / "deadly.py"
    deadly.write_text(SAMPLE.read_text() + DEADLY)
    done = run(root, deadly, "--arch", 90, "--cache", tmp_path)
    assert done.returncode == 1
    assert (
        "FAIL dies sm_90: does not compile: the compiler crashed; fatal error: told on stderr" in done.stderr
    )
    assert "1 fail" in done.stdout.splitlines()[-1]


LAUNCHED = """
from tools.kernels import launches

names = {case.kernel.__name__ for case in launches.recorded().values()}
listed = {case.kernel.__name__ for case in launches._listed_cases()}
print(*sorted(names - listed))
print(*sorted(listed - names))
"""


def test_what_is_launched_is_listed_and_what_is_listed_is_launched(root: Path) -> None:
    """Block copies and penalties have no place in a model's step."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    unlisted, elsewhere = done.stdout.splitlines()
    assert unlisted == ""
    assert set(elsewhere.split()) == {"_copy_blocks_kernel", "_penalize_kernel"}


@pytest.mark.timeout(300)
def test_the_kernels_hold_their_gates(root: Path) -> None:
    """The first launch of every kernel module, on sm_90. `make kernels` has them all, and three
    architectures; what is compiled here is kept for it.
    """
    done = run(root, "--first", "--arch", 90, "--jobs", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 10
