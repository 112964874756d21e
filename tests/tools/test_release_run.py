"""The run of a check: order, what fails and what is not run, limits, and a folder that is gone afterwards."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tools.release import __main__ as release
from tools.release.installing import demo_problems
from tools.release.work import NotRun, StepFailed, Work, finish

ENDED_WELL = """
completions   | 16 of 16
engine killed | kill -9 after 1.20 s, 900 tokens into the streams
moved         | 8 streams went on at the other engine; worst gap 300 ms
blocks        | 10 free, 0 active, 5 cached
"""


def passing(_: object) -> str:
    return "fine"


def failing(_: object) -> str:
    raise StepFailed("2 wrong\nthis\nthat")


def test_a_failure_stops_only_what_needs_it() -> None:
    told: list[release.Outcome] = []
    steps = {"clone": passing, "sbom": failing, "audit": passing, "build": failing, "demo": passing}
    outcomes = release.run_steps(None, steps, ["audit"], told.append)
    assert [(o.name, o.state) for o in outcomes] == [
        ("clone", "passed"),
        ("sbom", "failed"),
        ("audit", "not run"),
        ("build", "failed"),
        ("demo", "not run"),
    ]
    assert outcomes == told
    assert outcomes[-1].detail == "build failed"
    assert "2 wrong" in "".join(str(column) for column in release.table_of(outcomes).columns[3]._cells)


@pytest.mark.parametrize(
    ("step", "code", "kept", "last"),
    [
        (passing, 0, True, "1 passed, 0 failed, 0 not run"),
        (failing, 1, False, "0 passed, 1 failed, 0 not run"),
    ],
)
def test_the_folder_is_removed_and_a_failure_keeps_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: object,
    code: int,
    kept: bool,
    last: str,
) -> None:
    folders: list[Path] = []

    def make(work: Work) -> str:
        folders.append(work.folder)
        work.checkout.mkdir()
        work.constraints.write_text("a==1\n")
        (work.folder / "weft.whl").write_text("w")
        work.made.append(work.folder / "weft.whl")
        assert callable(step)
        return str(step(work))

    monkeypatch.setattr(release, "STEPS", {"only": make})
    out = tmp_path / "dist"
    assert release.main(["--out", str(out)]) == code
    assert not folders[0].exists()
    assert out.exists() == kept
    assert last in capsys.readouterr().out
    if kept:
        assert sorted(path.name for path in out.iterdir()) == ["SHA256SUMS", "constraints.txt", "weft.whl"]
        assert "  weft.whl\n" in (out / "SHA256SUMS").read_text()


def test_nothing_of_an_earlier_release_stays_beside_this_one(tmp_path: Path) -> None:
    out = tmp_path / "dist"
    for version in ("1", "2"):
        work = Work(tmp_path / version, "HEAD", "", 0.0)
        work.checkout.mkdir(parents=True)
        work.constraints.write_text("a==1\n")
        work.made.append(work.folder / f"weft-{version}.whl")
        work.made[0].write_text("w")
        release.keep(work, out)
        (out / "notes.txt").write_text("somebody's own")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["SHA256SUMS", "constraints.txt", "notes.txt", "weft-2.whl"]


def test_an_interrupt_removes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def interrupted(work: Work) -> str:
        folders.append(work.folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(release, "STEPS", {"only": interrupted})
    assert release.main(["--out", str(tmp_path / "dist")]) == 130
    assert not folders[0].exists()


def test_what_is_no_commit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["--commit", "no-such-commit"]) == 2
    assert capsys.readouterr().err.startswith("release-check: no-such-commit is no commit")


def test_steps_that_all_others_need_cannot_be_skipped() -> None:
    for name in release.STEPS:
        if name in release.NEEDED:
            with pytest.raises(SystemExit):
                release.parse(["--skip", name])
        else:
            assert release.parse(["--skip", name]).skip == [name]


def test_a_program_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    with pytest.raises(StepFailed, match="was still running"):
        finish([sys.executable, "-c", parent], tmp_path, os.environ, 4.0)
    if not pid.exists():
        pytest.skip("the machine was too busy to start two programs in 4 s")
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{pid.read_text()}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child lives")


def test_a_program_that_fails_shows_its_last_words(tmp_path: Path) -> None:
    work = Work(tmp_path, "HEAD", "", time.monotonic() + 60)
    with pytest.raises(StepFailed, match=r"ended with 3\n(.|\n)*the reason"):
        work.run([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])
    assert work.run([sys.executable, "-c", "raise SystemExit(3)"], expect=None).code == 3
    with pytest.raises(StepFailed, match="no-such-program"):
        work.run(["no-such-program"])


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="the time is over"):
        Work(tmp_path, "HEAD", "", time.monotonic() - 1).run([sys.executable, "-c", ""])


def test_children_know_nothing_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "WEFT_SERVER"):
        monkeypatch.setenv(name, "here")
    code = "import os; print([n for n, v in os.environ.items() if v == 'here'])"
    work = Work(tmp_path, "HEAD", "", time.monotonic() + 60)
    assert work.run([sys.executable, "-c", code]).out.strip() == "[]"


def test_without_a_wheel_the_steps_after_it_are_not_run(tmp_path: Path) -> None:
    work = Work(tmp_path, "HEAD", "", 0.0)
    for step in ("reproducible", "contents", "pins", "sbom", "licences", "bare", "install"):
        with pytest.raises(NotRun):
            release.STEPS[step](work)
    with pytest.raises(StepFailed, match="nothing was installed"):
        release.STEPS["demo"](work)


@pytest.mark.parametrize("line", ENDED_WELL.strip().splitlines())
def test_a_demo_must_have_said_it_all(line: str) -> None:
    assert demo_problems(ENDED_WELL) == []
    assert len(demo_problems(ENDED_WELL.replace(line, ""))) == 1
