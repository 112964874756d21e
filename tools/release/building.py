"""Wheel and source archive, from a clone of the commit and nothing else; built twice, to the same bytes."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from pathlib import Path

from tools.release.pins import read_pins
from tools.release.work import ROOT, StepFailed, Work

TOOLS = Path("tools/release/requirements.txt")


def clone(work: Work) -> str:
    """Clone the commit."""
    _clone(work, work.checkout)
    done = work.run(["git", "show", "-s", "--format=%H %ct"], cwd=work.checkout)
    commit, epoch = done.out.split()
    work.epoch = int(epoch)
    changed = work.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT).out.splitlines()
    note = f"; {len(changed)} changed files here are not in it" if changed else ""
    return f"{commit[:12]}{note}"


def _clone(work: Work, target: Path) -> None:
    work.run(["git", "clone", "--quiet", "--no-checkout", ROOT, target])
    work.run(["git", "checkout", "--quiet", "--detach", work.commit], cwd=target)


def make_tools(work: Work) -> str:
    """The environment with build, twine and the others, at their pinned versions."""
    python = work.make_environment("tools")
    wanted = work.checkout / TOOLS
    work.run([python, "-m", "pip", "install", "--quiet", "-r", wanted])
    pins = read_pins(wanted.read_text(encoding="utf-8"))
    return ", ".join(f"{name} {version}" for name, version in pins.items())


def build(work: Work) -> str:
    """Source archive, and the wheel from it, each in isolation."""
    work.sdist, work.wheel = _build(work, work.checkout, work.folder / "dist")
    work.made += [work.wheel, work.sdist]
    return ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in work.made)


def _build(work: Work, checkout: Path, out: Path, *flags: str) -> tuple[Path, Path]:
    pins = read_pins((checkout / TOOLS).read_text(encoding="utf-8"))
    constraint = work.folder / "build-constraint.txt"
    constraint.write_text(f"setuptools=={pins['setuptools']}\n", encoding="ascii")
    variables = {"SOURCE_DATE_EPOCH": str(work.epoch), "PIP_CONSTRAINT": str(constraint)}
    command = [work.tool_python, "-m", "build", "--outdir", out, *flags, checkout]
    work.run(command, variables=variables)
    made = [next(iter(out.glob(pattern)), out / "none") for pattern in ("*.tar.gz", "*.whl")]
    return made[0], made[1]


def build_again(work: Work) -> str:
    """Once more from another clone, and the wheel without the archive between: equal bytes each time."""
    wheel, sdist = work.need_wheel, work.sdist or work.need_wheel
    other = work.folder / "checkout-again"
    _clone(work, other)
    sdist_again, wheel_again = _build(work, other, work.folder / "dist-again")
    _, direct = _build(work, other, work.folder / "dist-direct", "--wheel")
    for name, first, second in (
        ("the source archive, built again,", sdist, sdist_again),
        ("the wheel, built again,", wheel, wheel_again),
        ("the wheel that comes straight from the sources", wheel, direct),
    ):
        if digest(first) != digest(second):
            raise StepFailed(f"{name} differs\n" + "\n".join(differences(first, second)))
    return f"sha256 {digest(wheel)[:16]} and {digest(sdist)[:16]}, twice; the wheel also without the archive"


def digest(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(first: Path, second: Path) -> list[str]:
    """The members by which two archives differ; the order alone counts as one."""
    ours, theirs = members(first), members(second)
    found = [f"only in one: {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    found += [f"differs: {name}" for name in ours if name in theirs and ours[name] != theirs[name]]
    return found or ["the order or the packing of the members"]


def members(path: Path) -> dict[str, tuple[object, ...]]:
    """Member -> time, mode and digest of a wheel's or a source archive's files."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {
                info.filename: (
                    info.date_time,
                    info.external_attr,
                    hashlib.sha256(wheel.read(info)).hexdigest(),
                )
                for info in wheel.infolist()
            }
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            data = file.read() if file else b""
            found[member.name] = (member.mtime, member.mode, hashlib.sha256(data).hexdigest())
    return found
