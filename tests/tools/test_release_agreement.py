"""The version stands in one place, and whatever else names one is compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.release.agreement import changelog_problems, package_version, problems
from weft import __version__

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = """
services:
  engine:
    image: ${WEFT_IMAGES:-weft}/engine:${WEFT_TAG:-1.2.3}
  gateway:
    image: "weft/gateway:1.2.3"
  other:
    image: prom/prometheus:v3.1.0
"""
KUSTOMIZATION = """
images:
  - {name: weft/engine, newTag: 1.2.3-cuda}
"""
LABEL = 'LABEL org.opencontainers.image.title="x" \\\n      org.opencontainers.image.version="1.2.3" \\\n'
POD = "spec:\n  containers:\n    - image: weft/quantizer\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose every version is 1.2.3."""
    (tmp_path / "weft").mkdir()
    (tmp_path / "weft" / "__init__.py").write_text('"""x"""\n__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n## 1.2.3 (2026-01-31)\n\n* It is.\n"
    )
    (tmp_path / "docker-compose.yml").write_text(COMPOSE)
    (tmp_path / "deploy" / "base").mkdir(parents=True)
    (tmp_path / "deploy" / "base" / "kustomization.yaml").write_text(KUSTOMIZATION)
    (tmp_path / "deploy" / "base" / "pod.yaml").write_text(POD)
    (tmp_path / "services" / "engine").mkdir(parents=True)
    (tmp_path / "services" / "engine" / "Dockerfile").write_text(LABEL)
    (tmp_path / "README.md").write_text("pip install 'weft-1.2.3-py3-none-any.whl[engine]'\n")
    return tmp_path


def test_this_checkout_agrees_with_itself() -> None:
    version, found, num_places = problems(ROOT, tags=[])
    assert (version, found) == (__version__, [])
    assert num_places >= 8, "compose, manifests, Dockerfiles, a client, pages"


def test_all_the_same(checkout: Path) -> None:
    assert problems(checkout, ["v1.2.3", "nightly"]) == ("1.2.3", [], 5)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (
            "docker-compose.yml",
            "WEFT_TAG:-1.2.3",
            "WEFT_TAG:-1.2.2",
            "docker-compose.yml: 1.2.2, the package is 1.2.3",
        ),
        ("docker-compose.yml", '"weft/gateway:1.2.3"', "weft/gateway", "docker-compose.yml: latest"),
        ("deploy/base/kustomization.yaml", "1.2.3-cuda", "1.2.4-cuda", "kustomization.yaml: 1.2.4-cuda"),
        ("deploy/base/pod.yaml", "weft/quantizer", "registry:5000/weft/quantizer:1.0.0", "pod.yaml: 1.0.0"),
        ("services/engine/Dockerfile", "1.2.3", "1.2", "services/engine/Dockerfile: 1.2, the package is"),
        ("README.md", "weft-1.2.3", "weft-1.2.4", "README.md: 1.2.4"),
        ("CHANGELOG.md", "## 1.2.3", "## 1.2.2", "the newest entry is 1.2.2"),
        ("CHANGELOG.md", "* It is.", "", "nothing is written under 1.2.3"),
    ],
)
def test_each_that_differs_is_named(checkout: Path, name: str, old: str, new: str, said: str) -> None:
    path = checkout / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    _, found, _ = problems(checkout, [])
    assert len(found) == 1
    assert said in found[0]


def test_a_tag_must_be_the_versions(checkout: Path) -> None:
    assert problems(checkout, ["v1.2.4"])[1] == ["the tag v1.2.4 is not v1.2.3"]


@pytest.mark.parametrize(
    "line", ["", '__version__ = "1.2"\n', '__version__ = "1.2.3"\n__version__ = "1.2.3"\n']
)
def test_a_version_that_cannot_be_told_is_refused(checkout: Path, line: str) -> None:
    (checkout / "weft" / "__init__.py").write_text(line)
    with pytest.raises(ValueError, match="must be given once"):
        package_version(checkout)


def test_an_entry_may_wait_for_its_date_until_the_tag() -> None:
    waiting = "## Unreleased\n\n* More.\n\n## 1.2.3 (unreleased)\n\n* It is.\n"
    assert changelog_problems(waiting, "1.2.3", is_tagged=False) == []
    assert changelog_problems(waiting, "1.2.3", is_tagged=True) == [
        "CHANGELOG.md: 1.2.3 must be dated, as in `## 1.2.3 (2026-01-31)`",
        "CHANGELOG.md: Unreleased is not empty, and the commit is tagged",
    ]
    assert changelog_problems("## 1.2.3 (soon)\n\n* x\n", "1.2.3", is_tagged=False)
    assert changelog_problems("# Changelog\n", "1.2.3", is_tagged=False) == [
        "CHANGELOG.md has no entry with a version"
    ]
