"""What is in wheel and source archive, told by names; and archives that are the same to the byte."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tools.release.building import differences, digest
from tools.release.contents import (
    ALWAYS,
    LEFT_OUT,
    OF_THE_SOURCES,
    PACKAGES,
    expected_files,
    metadata_problems,
    source_problems,
    wheel_problems,
)

ROOT = Path(__file__).resolve().parents[2]
LISTED = [
    "weft/__init__.py",
    "weft/py.typed",
    "weft/v1/generation_pb2.pyi",
    "services/engine/Dockerfile",
    "services/engine/kernels/native/linear.c",
    "services/quantizer/data/README.md",
    "models/demo/model.safetensors",
    "protos/weft/v1/generation.proto",
    "tests/weft/test_x.py",
    "tools/size.py",
    *OF_THE_SOURCES,
]
WHEEL = [
    "weft/__init__.py",
    "weft/py.typed",
    "weft/v1/generation_pb2.pyi",
    "services/engine/kernels/native/linear.c",
    "services/quantizer/data/README.md",
    "cli/demo/model/model.safetensors",
    "weft/protos/weft/v1/generation.proto",
    "weft-1.2.3.dist-info/METADATA",
    "weft-1.2.3.dist-info/licenses/LICENSE",
]
SOURCES = [name for name in LISTED if name.partition("/")[0] not in ("tests", "tools")]
METADATA = """\
Metadata-Version: 2.4
Name: weft
Version: 1.2.3
License-Expression: Apache-2.0 AND CC0-1.0
Requires-Python: >=3.11
Requires-Dist: grpcio>=1.74
Provides-Extra: bench
Provides-Extra: engine
Provides-Extra: gateway
Provides-Extra: quantizer
Provides-Extra: ray
Requires-Dist: torch<2.14,>=2.11; extra == "engine"

Words.
"""


def without(names: list[str], name: str) -> list[str]:
    assert name in names
    return [other for other in names if other != name]


def test_whole_archives_are_fine() -> None:
    assert wheel_problems(WHEEL, LISTED) == []
    assert source_problems(SOURCES, LISTED) == []
    assert metadata_problems(METADATA, "1.2.3") == []


@pytest.mark.parametrize("name", [name for name in WHEEL if "METADATA" not in name and "README" not in name])
def test_what_a_wheel_lacks_is_named(name: str) -> None:
    (found,) = wheel_problems(without(WHEEL, name), LISTED)
    assert name in found or found == "the wheel has no licence"


@pytest.mark.parametrize(
    "name", ["tests/test_x.py", "tools/size.py", "weft/__pycache__/a.pyc", "weft/stray.py", "services/.env"]
)
def test_what_a_wheel_should_not_have_is_named(name: str) -> None:
    found = wheel_problems([*WHEEL, name], LISTED)
    assert found
    assert all(name in line for line in found)


def test_what_a_source_archive_lacks_or_should_not_have_is_named() -> None:
    for name in ("setup.py", "models/demo/model.safetensors", "services/engine/kernels/native/linear.c"):
        assert source_problems(without(SOURCES, name), LISTED) == [f"not in the source archive: {name}"]
    assert source_problems([*SOURCES, "tests/conftest.py"], LISTED) == ["not for users: tests/conftest.py"]


def test_everything_of_the_packages_here_is_expected() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git here")
    expected = expected_files(listed.stdout.splitlines())
    assert set(ALWAYS) <= expected
    assert {"services/quantizer/data/calibration.txt", "weft/protos/weft/v1/generation.proto"} <= expected
    assert not [name for name in expected if name.startswith(("tests", "tools")) or "Dockerfile" in name]


def test_every_file_of_a_package_is_package_data() -> None:
    """Told without a build: folders with Python are packages, a pattern of pyproject.toml takes the rest."""
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git here")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    files = [Path(name) for name in listed.stdout.splitlines() if not LEFT_OUT.search(name)]
    packages = {path.parent for path in files if path.suffix == ".py"}
    assert not [str(folder) for folder in packages if not (ROOT / folder / "__init__.py").is_file()]
    left = [
        str(path)
        for path in files
        if path.suffix != ".py"
        and not any(
            path.is_relative_to(folder) and path.relative_to(folder).match(pattern)
            for folder in packages
            for pattern in settings["package-data"]["*"]
            if path.parent == folder / Path(pattern).parent
        )
    ]
    assert not left, "add a pattern to [tool.setuptools.package-data]"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Version: 1.2.3", "Version: 1.2.4", "Version is 1.2.4, not 1.2.3"),
        ("Apache-2.0 AND", "MIT AND", "License-Expression is MIT AND CC0-1.0"),
        ("Provides-Extra: ray\n", "", "no extra ray"),
        ('; extra == "engine"', "", "needed without any extra: torch<2.14,>=2.11"),
    ],
)
def test_wrong_metadata_is_named(old: str, new: str, said: str) -> None:
    assert metadata_problems(METADATA.replace(old, new), "1.2.3") == [said]


@pytest.fixture(scope="module")
def setup_module_of_the_project() -> ModuleType:
    """setup.py, imported without setting anything up."""
    setuptools = pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("weft_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    real, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        spec.loader.exec_module(module)
    finally:
        setuptools.setup = real
    return module


def archive(path: Path, times: int, mode: int, names: tuple[str, ...]) -> Path:
    with tarfile.open(path, "w:gz") as out:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime, member.mode, member.uname, member.size = times, mode, "builder", 3
            out.addfile(member, io.BytesIO(b"abc"))
    return path


def test_the_same_files_give_the_same_archive(
    tmp_path: Path, setup_module_of_the_project: ModuleType
) -> None:
    first = archive(tmp_path / "a.tar.gz", 1, 0o600, ("x/b", "x/a"))
    second = archive(tmp_path / "b.tar.gz", 2, 0o664, ("x/a", "x/b"))
    assert digest(first) != digest(second)
    assert differences(first, second) == ["differs: x/b", "differs: x/a"]
    for path in (first, second):
        setup_module_of_the_project.rewrite(path, 1_700_000_000)
        os.utime(path, (5, 5))
    assert digest(first) == digest(second)
    with tarfile.open(first) as packed:
        assert [(m.name, m.mtime, m.mode, m.uname) for m in packed] == [
            ("x/a", 1_700_000_000, 0o644, ""),
            ("x/b", 1_700_000_000, 0o644, ""),
        ]
        file = packed.extractfile("x/a")
        assert file is not None
        assert file.read() == b"abc"


def test_wheels_are_compared_by_member(tmp_path: Path) -> None:
    for name, data in (("a.whl", b"1"), ("b.whl", b"2")):
        with zipfile.ZipFile(tmp_path / name, "w") as out:
            out.writestr(zipfile.ZipInfo("same"), b"0")
            out.writestr(zipfile.ZipInfo("other"), data)
            if name == "b.whl":
                out.writestr(zipfile.ZipInfo("more"), b"")
    assert differences(tmp_path / "a.whl", tmp_path / "b.whl") == ["only in one: more", "differs: other"]
