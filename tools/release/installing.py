"""The wheel as a stranger installs it: in a fresh environment, used from an empty folder, with the demo."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tools.release.agreement import package_version
from tools.release.work import StepFailed, Work

DEMO_EXTRAS = ("engine", "gateway", "quantizer")
EXIT_USAGE = 2


def install(work: Work) -> str:
    """The wheel with the services' extras, under the pins."""
    wheel = work.need_wheel
    began = time.monotonic()
    python = work.make_environment("room")
    pip = [python, "-m", "pip", "install", "--quiet", "-c", work.constraints]
    if work.torch_index:
        work.run([*pip, "--no-deps", "--index-url", work.torch_index, "torch"])
    work.run([*pip, f"{wheel}[{','.join(DEMO_EXTRAS)}]"])
    work.run([python, "-m", "pip", "check"])
    folder = empty_folder(work)
    said = work.run([python.with_name("weft"), "--version"], cwd=folder).out.strip()
    if said != f"weft {package_version(work.checkout)}":
        raise StepFailed(f"weft --version says {said!r}")
    return f"{said}, nothing missing or at odds, {time.monotonic() - began:.0f} s"


def run_demo(work: Work) -> str:
    """`weft demo` in an empty folder."""
    weft = work.folder / "room" / "bin" / "weft"
    if not weft.exists():
        raise StepFailed("nothing was installed to run it with")
    began = time.monotonic()
    folder = empty_folder(work)
    done = work.run([weft, "demo"], cwd=folder)
    if found := demo_problems(done.out):
        raise StepFailed("\n".join([*found, done.tail()]))
    if left := sorted(path.name for path in folder.iterdir() if path.name != ".weft"):
        raise StepFailed(f"the demo left {', '.join(left)} beside its folder")
    (moved,) = re.findall(r"(\d+) streams went on", done.out)
    (tokens,) = re.findall(r"(\d+ in [\d.]+ s) = ", done.out)
    return f"16 of 16 streams ended, {moved} moved, tokens: {tokens}; {time.monotonic() - began:.0f} s in all"


def demo_problems(text: str) -> list[str]:
    """What a run of the demo that ended well must have said, and has not."""
    wanted = {
        "sixteen completions": r"16 of 16",
        "an engine that was killed": r"kill -9 after",
        "streams that went on at the other engine": r"[1-9]\d* streams went on",
        "blocks that were given back": r"\b0 active",
    }
    return [
        f"the demo tells of no {what}" for what, pattern in wanted.items() if not re.search(pattern, text)
    ]


def say_what_is_missing(work: Work) -> str:
    """Without extras every command that wants one says so, in one line."""
    wheel = work.need_wheel
    python = work.make_environment("bare")
    work.run([python, "-m", "pip", "install", "--quiet", "-c", work.constraints, wheel])
    work.run([python, "-m", "pip", "check"])
    folder = empty_folder(work)
    work.run([python.with_name("weft"), "plan"], cwd=folder)
    source = [
        "--source",
        work.checkout / "models" / "demo",
        "--artifacts",
        work.folder / "none",
        "--name",
        "demo",
    ]
    commands: dict[str, list[object]] = {
        "weft demo": [python.with_name("weft"), "demo"],
        "services.engine": [python, "-m", "services.engine", "serve"],
        "services.gateway": [python, "-m", "services.gateway", "serve"],
        "services.quantizer": [python, "-m", "services.quantizer", "run", *source],
    }
    for name, command in commands.items():
        extra = ",".join(DEMO_EXTRAS) if name == "weft demo" else name.partition(".")[2]
        done = work.run(command, cwd=folder, expect=EXIT_USAGE)
        lines = done.err.strip().splitlines()
        if len(lines) != 1 or f"pip install 'weft[{extra}]'" not in lines[0]:
            raise StepFailed(f"{name} without its packages says\n{done.tail()}")
    if left := list(folder.iterdir()):
        raise StepFailed(f"{left[0].name} was made before it was known that packages are missing")
    return f"weft plan works; {', '.join(commands)}: one line with the extra's name"


def empty_folder(work: Work) -> Path:
    """A new one, so that no source beside the caller is imported by mistake."""
    folder = work.folder / f"empty-{time.monotonic_ns()}"
    folder.mkdir()
    return folder
