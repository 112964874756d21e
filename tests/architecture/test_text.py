"""The project speaks of itself alone: no path of one machine, no index of one network, no outside folder."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (".cfg", ".html", ".ini", ".json", ".md", ".proto", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml")
BUILD_FILES = re.compile(
    r"(^|/)(Makefile|Dockerfile.*|docker-compose.*|pyproject\.toml|constraints\.txt|run)$"
)
BUILD_HOSTS = {"download.pytorch.org", "127.0.0.1"}
# Read by tests and benchmarks only, and only with a clean skip.
BESIDE = "../" + "shared"


def tracked() -> list[Path]:
    """The files git knows, generated stubs and large data left out; every file where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:
        paths = [
            p.relative_to(ROOT)
            for p in ROOT.rglob("*")
            if p.is_file() and not p.parts[len(ROOT.parts)].startswith(".")
        ]
    named = [p for p in paths if p.suffix in TEXT or BUILD_FILES.search(p.as_posix())]
    return [p for p in named if "_pb2" not in p.name and p.name != "tokenizer.json"]


def lines_with(pattern: str, paths: list[Path]) -> list[str]:
    regex = re.compile(pattern)
    return [
        f"{path}:{number} {line.strip()[:100]}"
        for path in paths
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        if regex.search(line)
    ]


def test_nothing_leans_on_a_folder_beside_the_checkout() -> None:
    outside = [p for p in tracked() if p.parts[0] not in ("tests", "benchmarks")]
    assert not (hits := lines_with(re.escape(BESIDE), outside)), "\n".join(hits)


def test_no_path_of_one_machine() -> None:
    checkout = re.escape(f"{ROOT}/") if len(ROOT.parts) > 2 else "$^"
    homes = r"(?<![\w.$}])/(?:" + "work|home|root|Users" + r")/\w"
    assert not (hits := lines_with(f"{checkout}|{homes}", tracked())), "\n".join(hits)


def test_no_word_of_how_it_was_made() -> None:
    """Readers of the repository have the repository: it names no page that is not in it."""
    pages = "|".join(page + r"\.md" for page in ("DESIGN", "HOUSE", "BRIEF"))
    prose = [p for p in tracked() if p != Path("tests/architecture/test_text.py")]
    assert not (hits := lines_with(rf"\b(?:{pages})\b", prose)), "\n".join(hits)


def test_build_files_name_no_private_index() -> None:
    builds = [p for p in tracked() if BUILD_FILES.search(p.as_posix())]
    assert builds
    hosts = {
        host
        for path in builds
        for host in re.findall(r"(?:https?|file)://([^/\s'\"):]*)", (ROOT / path).read_text(encoding="utf-8"))
    }
    assert hosts <= BUILD_HOSTS


def test_no_mark_is_left_behind() -> None:
    marks = r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b"
    code = [p for p in tracked() if p.suffix in (".py", ".proto", ".yml", ".toml") or p.name == "Makefile"]
    assert not (hits := lines_with(marks, code)), "\n".join(hits)
