"""Whether all that names the version names the same one: the package, the changelog, the images, a tag.

Reads a checkout's files as text. Does not know what a version means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# 0.1.0, 0.2.0rc1, 1.0.0.post1: what PEP 440 calls a public version, with three numbers.
_VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?")
_ASSIGNED = re.compile(r"""^__version__ = ["']([^"']*)["']""", re.M)
_HEADING = re.compile(r"^## +(\S+)(?: +\((.*)\))? *$", re.M)
_IMAGE = re.compile(r"""^\s*(?:-\s*)?image:\s*["']?(\S*?)["']?\s*$""", re.M)
_OURS = re.compile(r"(?:^|/)weft[/-](engine|gateway|quantizer)(?::(.*))?$")
_NEW_TAG = re.compile(r"""newTag:\s*["']?([^"',}\s]+)""")
_LABEL = re.compile(r"""app\.kubernetes\.io/version:\s*["']?([^"',}\s]+)""")
_DEFAULT = re.compile(r"\$\{[A-Za-z_]\w*:?-([^}]*)\}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
# Where else a version stands: files, and what to look for in them.
_ELSEWHERE = (
    ("services/*/Dockerfile", re.compile(r"""image\.version=["']?([^"'\s\\]+)""")),
    ("clients/*/package.json", re.compile(r'''^  "version": "([^"]*)"''', re.M)),
    ("README.md", re.compile(r"\bweft-(\d[^-\s]*)-py3-none-any\.whl")),
    ("docs/releasing.md", re.compile(r"\bweft-(\d[^-\s]*)-py3-none-any\.whl")),
)
# What a tag may add to a version: a build of the same sources for another device.
_VARIANT = re.compile(r"-(cpu|cuda|gpu)$")


class Named(NamedTuple):
    """A version that a file names, and where."""

    where: str
    version: str


def package_version(root: Path) -> str:
    """`weft.__version__`, read and not imported. Raises ValueError."""
    found = _ASSIGNED.findall((root / "weft" / "__init__.py").read_text(encoding="utf-8"))
    if len(found) != 1 or not _VERSION.fullmatch(found[0]):
        raise ValueError(f"weft/__init__.py: __version__ must be given once, as 1.2.3: found {found}")
    version: str = found[0]
    return version


def changelog_problems(text: str, version: str, is_tagged: bool) -> list[str]:
    """The newest entry with a number must be this version's, with something in it. Before a tag it may say
    "unreleased" where the date will be; with a tag nothing may be left above it.
    """
    parts = _HEADING.split(text)
    entries = [(parts[i], parts[i + 1] or "", parts[i + 2].strip()) for i in range(1, len(parts) - 2, 3)]
    numbered = [entry for entry in entries if _VERSION.fullmatch(entry[0])]
    if not numbered:
        return ["CHANGELOG.md has no entry with a version"]
    newest, said, body = numbered[0]
    if newest != version:
        return [f"CHANGELOG.md: the newest entry is {newest}, the package is {version}"]
    problems = [] if body else [f"CHANGELOG.md: nothing is written under {version}"]
    if not _DATE.fullmatch(said) and (is_tagged or said != "unreleased"):
        problems.append(f"CHANGELOG.md: {version} must be dated, as in `## {version} (2026-01-31)`")
    if is_tagged and entries[0][0] != version and entries[0][2]:
        problems.append(f"CHANGELOG.md: {entries[0][0]} is not empty, and the commit is tagged")
    return problems


def image_tags(root: Path) -> Iterator[Named]:
    """The tags of our images in compose files and manifests. One without a tag counts as `latest`, except in
    manifests, where a kustomization gives it.
    """
    for path in sorted(root.glob("docker-compose*.yml")):
        yield from _tags_of(path, root, without="latest")
    for path in sorted((root / "deploy").rglob("*.y*ml")):
        yield from _tags_of(path, root, without=None)
        text = path.read_text(encoding="utf-8")
        for tag in (*_NEW_TAG.findall(text), *_LABEL.findall(text)):
            yield Named(path.relative_to(root).as_posix(), tag)


def other_versions(root: Path) -> Iterator[Named]:
    """Versions in labels of images, in packages of clients, and in what the pages tell people to type."""
    for pattern, regex in _ELSEWHERE:
        for path in sorted(root.glob(pattern)):
            for version in regex.findall(path.read_text(encoding="utf-8")):
                yield Named(path.relative_to(root).as_posix(), version)


def _tags_of(path: Path, root: Path, without: str | None) -> Iterator[Named]:
    for image in _IMAGE.findall(path.read_text(encoding="utf-8")):
        ours = _OURS.search(_DEFAULT.sub(r"\1", image))
        if ours and (tag := ours[2] or without):
            yield Named(path.relative_to(root).as_posix(), tag)


def problems(root: Path, tags: Sequence[str]) -> tuple[str, list[str], int]:
    """The version, whatever does not agree with it, and how many places were compared. `tags` are those of
    the commit. Raises ValueError, OSError.
    """
    version = package_version(root)
    releases = [tag for tag in tags if tag.startswith("v")]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = changelog_problems(changelog, version, is_tagged=bool(releases))
    found += [f"the tag {tag} is not v{version}" for tag in releases if tag != f"v{version}"]
    named = [*image_tags(root), *other_versions(root)]
    found += [
        f"{where}: {tag}, the package is {version}"
        for where, tag in named
        if _VARIANT.sub("", tag) != version
    ]
    return version, found, len(named)
