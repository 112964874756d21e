"""A package that is missing is told in one line, with the extra that has it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from weft.extras import how_to_install, missing, said_in_one_line

ROOT = Path(__file__).resolve().parents[2]
REQUIRES = [
    "grpcio>=1.74",
    'no-such-torch<2.14,>=2.11; extra == "engine"',
    'pytest>=8; extra == "engine"',
    "no_such.jinja>=3; extra == 'gateway'",
    'no-such-torch<2.14,>=2.11; extra == "quantizer"',
]
# What each service cannot start without.
NEEDED = {"engine": "torch", "gateway": "tokenizers", "quantizer": "torch"}
BLOCKED = """
import runpy, sys
sys.modules[sys.argv[1]] = None
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.requires
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: REQUIRES if name == "weft" else real(name)
    )


def test_missing_packages_are_told_by_extra(metadata: None) -> None:
    assert missing(["engine", "gateway"]) == {"engine": ["no-such-torch"], "gateway": ["no_such.jinja"]}
    assert missing(["ray"]) == {}


def test_a_bare_clone_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", raise_)
    assert missing(["engine"]) == {}


def test_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, said_in_one_line("engine", "python -m services.engine"):
        import no_such_package.inner  # noqa: F401
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == "python -m services.engine: no_such_package is not installed: pip install 'weft[engine]'\n"


def test_a_module_of_ours_that_is_missing_is_a_fault() -> None:
    with pytest.raises(ModuleNotFoundError), said_in_one_line("engine", "x"):
        import weft.no_such_module  # noqa: F401


def test_the_command_names_all_extras() -> None:
    assert how_to_install(["engine", "gateway"]) == "pip install 'weft[engine,gateway]'"


@pytest.mark.parametrize("service", NEEDED)
def test_a_service_without_its_packages_says_so(service: str, tmp_path: Path) -> None:
    """The import is refused as if the package was not there."""
    words = ["serve"]
    if service == "quantizer":
        words = ["run", "--source", "models/demo", "--artifacts", str(tmp_path / "none"), "--name", "demo"]
    command = [sys.executable, "-c", BLOCKED, NEEDED[service], f"services.{service}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    *before, line = done.stderr.splitlines()
    assert f"{NEEDED[service]} is not installed: pip install 'weft[{service}]'" in line
    assert not [other for other in before if not other.startswith("{")], "nothing but log lines before it"
