"""`python -m tools.release`: check that a commit is a release, and leave in dist/ what a release consists of.

Every step runs in a temporary folder that is removed at the end. Exit code 0 when no step failed, 1 when one
did, 2 on wrong usage. A step that could not be run is told as that, never as passed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from tools.release import agreement, audit, building, contents, installing, licences, pins, sbom
from tools.release.work import ROOT, NotRun, StepFailed, Work

LIMIT_S = 3000.0
SUMS = "SHA256SUMS"
STYLES = {"passed": "green", "failed": "bold red", "not run": "yellow"}


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    state: str
    """passed, failed or not run."""
    detail: str
    seconds: float


def check_agreement(work: Work) -> str:
    """Version, changelog, image tags and whatever else names a version, and the commit's tag."""
    tags = work.run(["git", "tag", "--points-at", "HEAD"], cwd=work.checkout).out.split()
    try:
        version, problems, num_places = agreement.problems(work.checkout, tags)
    except (OSError, ValueError) as error:
        raise StepFailed(str(error)) from None
    if problems:
        raise StepFailed(f"{len(problems)} at odds\n" + "\n".join(problems))
    return f"{version}: package, changelog, {num_places} tags, labels and pages{', tag' if tags else ''}"


# In this order; a step takes what those before it have made.
STEPS: dict[str, Callable[[Work], str]] = {
    "clone": building.clone,
    "version": check_agreement,
    "tools": building.make_tools,
    "build": building.build,
    "reproducible": building.build_again,
    "contents": contents.check,
    "pins": pins.check,
    "sbom": sbom.make,
    "licences": licences.check,
    "audit": audit.check,
    "bare": installing.say_what_is_missing,
    "install": installing.install,
    "demo": installing.run_demo,
}
NEEDED = ("clone", "tools", "build")


def run_steps(
    work: Any, steps: dict[str, Callable[[Any], str]], skipped: Sequence[str], told: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run the steps in order; when a needed one fails the others are not run."""
    outcomes: list[Outcome] = []
    broken = ""
    for name, step in steps.items():
        began = time.monotonic()
        try:
            if broken:
                raise NotRun(f"{broken} failed")
            if name in skipped:
                raise NotRun("skipped")
            state, detail = "passed", step(work)
        except NotRun as reason:
            state, detail = "not run", str(reason)
        except (StepFailed, OSError, ValueError, KeyError) as reason:
            kind = "" if isinstance(reason, StepFailed) else f"{type(reason).__name__}: "
            state, detail = "failed", f"{kind}{reason}"
            broken = name if name in NEEDED else ""
        outcomes.append(Outcome(name, state, detail, time.monotonic() - began))
        told(outcomes[-1])
    return outcomes


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """One row a step, the first line of what it says."""
    table = Table(title="release-check", title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    for outcome in outcomes:
        first = outcome.detail.partition("\n")[0]
        state = f"[{STYLES[outcome.state]}]{outcome.state}[/]"
        table.add_row(outcome.name, state, f"{outcome.seconds:.0f}", first.replace("[", "\\["))
    return table


def keep(work: Work, out: Path) -> None:
    """Put what was made into `out`, with the pins and a list of digests. What an earlier check has listed
    there goes: the folder is uploaded as it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    digests = out / SUMS
    for line in digests.read_text(encoding="ascii").splitlines() if digests.is_file() else ():
        (out / Path(line.partition("  ")[2]).name).unlink(missing_ok=True)
    kept = [Path(shutil.copy2(path, out)) for path in (*work.made, work.constraints)]
    lines = [f"{building.digest(path)}  {path.name}\n" for path in sorted(kept)]
    digests.write_text("".join(lines), encoding="ascii")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__)
    parser.add_argument("--commit", default="HEAD", help="what to check (HEAD)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where a release goes (dist)")
    skippable = [name for name in STEPS if name not in NEEDED]
    parser.add_argument(
        "--skip", action="append", default=[], choices=skippable, metavar="STEP", help=", ".join(skippable)
    )
    parser.add_argument("--torch-index", default="", metavar="URL", help="an index to take torch from")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help=f"for all ({LIMIT_S:.0f})")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the steps, print the table, keep what was made when none failed."""
    arguments = parse(words)
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    asked = ["git", "rev-parse", "--verify", "--quiet", f"{arguments.commit}^{{commit}}"]
    commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not commit:
        print(f"release-check: {arguments.commit} is no commit of {ROOT}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="weft-release-"))
    work = Work(folder, commit, arguments.torch_index, time.monotonic() + arguments.limit)
    try:
        outcomes = run_steps(work, STEPS, arguments.skip, lambda outcome: _tell(console, outcome))
        failed = [outcome for outcome in outcomes if outcome.state == "failed"]
        if not failed:
            keep(work, arguments.out)
    except KeyboardInterrupt:
        print("release-check: interrupted; nothing was kept", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console.print(table_of(outcomes))
    not_run = [outcome.name for outcome in outcomes if outcome.state == "not run"]
    print(
        f"release-check: {len(outcomes) - len(failed) - len(not_run)} passed, {len(failed)} failed, "
        f"{len(not_run)} not run{': ' + ', '.join(not_run) if not_run else ''}"
    )
    if failed:
        return 1
    print(f"release-check: {len(work.made) + 2} files in {arguments.out}")
    return 0


def _tell(console: Console, outcome: Outcome) -> None:
    line = f"{outcome.name:13} {outcome.state:8} {outcome.seconds:5.0f} s  {outcome.detail}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A SIGTERM leaves the same way as a Ctrl-C: with the folder removed."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
