"""Where a check works, and how it runs other programs: with a limit, in a group of its own, with the words of
their failure. Knows no step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weft.config import environment_without

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("engine", "gateway", "quantizer", "ray", "bench")
TAIL_LINES = 12
# What would lead a child to the packages of this process, or to a server of the user's.
_UNWANTED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class StepFailed(Exception):
    """A step found something wrong. The message is for the table; its further lines are shown below it."""


class NotRun(Exception):
    """A step could not be run, which is no success. The message says why."""


@dataclass
class Work:
    """One check: its temporary folder, its limit, and what the steps have made so far."""

    folder: Path
    commit: str
    torch_index: str
    give_up_at: float
    """Of time.monotonic()."""
    epoch: int = 0
    """The commit's time in seconds since 1970: SOURCE_DATE_EPOCH of every build."""
    wheel: Path | None = None
    sdist: Path | None = None
    reports: dict[str, Path] = field(default_factory=dict)
    """Extra -> what pip would install for it."""
    made: list[Path] = field(default_factory=list)
    """Files that a release consists of."""

    @property
    def checkout(self) -> Path:
        """The clone that everything comes from."""
        return self.folder / "checkout"

    @property
    def constraints(self) -> Path:
        """The pins of the clone."""
        return self.checkout / "constraints.txt"

    @property
    def tool_python(self) -> Path:
        """The interpreter that has build, twine and the others."""
        return self.folder / "tools" / "bin" / "python"

    @property
    def need_wheel(self) -> Path:
        """The wheel. Raises NotRun when none was built."""
        if self.wheel is None:
            raise NotRun("no wheel was built")
        return self.wheel

    @property
    def need_reports(self) -> dict[str, Path]:
        """What pip would install. Raises NotRun when it was not asked."""
        if not self.reports:
            raise NotRun("what pip would install is not known")
        return self.reports

    def run(
        self,
        command: Sequence[object],
        *,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
        expect: int | None = 0,
    ) -> Finished:
        """Run a program to its end, or to the end of the time. `expect` None takes any exit code. Raises
        StepFailed.
        """
        words = [str(word) for word in command]
        left_s = self.give_up_at - time.monotonic()
        if left_s <= 0:
            raise StepFailed("the time is over")
        environment = environment_without("WEFT_")
        for name in _UNWANTED:
            environment.pop(name, None)
        done = finish(words, cwd or self.folder, {**environment, **(variables or {})}, left_s)
        if expect is not None and done.code != expect:
            shown = " ".join(Path(word).name if word.startswith("/") else word for word in words[:6])
            raise StepFailed(f"{shown} ... ended with {done.code}\n{done.tail()}")
        return done

    def make_environment(self, name: str) -> Path:
        """A fresh virtual environment in the folder; its interpreter."""
        self.run([sys.executable, "-m", "venv", self.folder / name])
        return self.folder / name / "bin" / "python"


@dataclass(frozen=True)
class Finished:
    """What a program left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    def tail(self) -> str:
        """The last lines of both."""
        lines = [line for line in (self.out + "\n" + self.err).splitlines() if line.strip()]
        return "\n".join(lines[-TAIL_LINES:])


def finish(words: list[str], cwd: Path, environment: Mapping[str, str], limit_s: float) -> Finished:
    """Run a program in a process group of its own. Whatever ends the wait, none of the group stays behind.
    Raises StepFailed when the time is over or the program does not exist.
    """
    try:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise StepFailed(f"{words[0]}: {error.strerror}") from None
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise StepFailed(f"{Path(words[0]).name} was still running when the time was over") from None
    finally:
        end_group(process)
    return Finished(process.returncode, out, err)


def end_group(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the program, so that it can end what it started elsewhere; then SIGKILL to its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
