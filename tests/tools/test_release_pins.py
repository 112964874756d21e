"""constraints.txt pins all that each extra brings, read from the installed metadata; services stay apart."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.release.pins import APART, BROUGHT_BY_TORCH, normalised, problems, read_pins, resolved

ROOT = Path(__file__).resolve().parents[2]
PINS = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@functools.cache
def closure(extra: str) -> dict[str, str]:
    """Name -> installed version of all that the extra needs on this machine, extras of others followed."""
    todo = [
        Requirement(line) for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra])
    ]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = normalised(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                distribution = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                raise LookupError(f"{name} is not installed") from None
            found[name] = distribution.version
            for line in distribution.requires or []:
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate({"extra": wanted}):
                    todo.append(inner)
    return found


def installed_closure(extra: str) -> dict[str, str]:
    """`closure`, or a skip."""
    try:
        return closure(extra)
    except LookupError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_everything_an_extra_brings_is_pinned(extra: str) -> None:
    names = {name for name in installed_closure(extra) if not BROUGHT_BY_TORCH.fullmatch(name)}
    assert not names - PINS.keys()


@pytest.mark.parametrize("extra", APART)
def test_the_services_dependencies_stay_apart(extra: str) -> None:
    assert not [name for name in APART[extra] if name in installed_closure(extra)]


def test_no_pin_is_left_that_nothing_needs() -> None:
    """Of what is installed; an extra that is not has pins that are not."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the pins are those of Python 3.11")
    needed: set[str] = set()
    for extra in PROJECT["optional-dependencies"]:
        with contextlib.suppress(LookupError):
            needed |= closure(extra).keys()
    installed = {normalised(distribution.name) for distribution in importlib.metadata.distributions()}
    assert not PINS.keys() & installed - needed


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"numpy": "2.3.5"}, ["[engine] numpy 2.3.5 is not pinned"]),
        ({"torch": "2.12.0"}, ["[engine] torch 2.12.0 is pinned to 2.13.0"]),
        ({"torch": "2.13.0+cpu", "triton": "3.6.0", "nvidia-cublas": "13.0"}, []),
        ({"starlette": "1.0"}, ["[engine] starlette does not belong there"]),
    ],
)
def test_what_the_resolver_says_is_judged(found: dict[str, str], said: list[str]) -> None:
    assert problems("engine", found, {"torch": "2.13.0", "starlette": "1.0"}) == said


def test_a_report_is_read() -> None:
    items = [{"metadata": {"name": name, "version": "1"}} for name in ("weft", "Jinja2", "typing_extensions")]
    assert resolved(json.loads(json.dumps({"install": items}))) == {"jinja2": "1", "typing-extensions": "1"}


@pytest.mark.parametrize("line", ["torch", "torch>=2.13", "torch==2.*", "torch==2.13,<3", "a==1\nA==1"])
def test_only_exact_pins_are_pins(line: str) -> None:
    with pytest.raises(ValueError, match=r"constraints\.txt"):
        read_pins(line)
