"""From what a client asked for to the options of `run`. Every check that needs no weights is made here, with
the words of `run` itself; what a client names stays below the roots it may name things in.

A spec is a dict of the fields that were set; their names are those of the options. Knows no wire.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.quantizer.config import PATH_SEPARATOR, QuantizerConfig, split_weight
from weft.config import ConfigError, build_config

MAX_PATH_CHARS = 512
MAX_TEXT_CHARS = 64
MAX_CALIBRATION_FILES = 64
MAX_TOKENS = 1 << 30
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[0-9a-f]{40}")
_ANY_GPU = "cuda"


class SpecRefused(Exception):
    """`violations` are (field, reason) pairs."""

    def __init__(self, violations: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {reason}" for field, reason in violations))
        self.violations = list(violations)


@dataclass(frozen=True, slots=True)
class Places:
    """Where sources, artifacts and calibration texts lie. Without a calibration root no text can be named;
    without a cache of its own, hub models go where the hub's client keeps them.
    """

    sources: Path
    artifacts: Path
    calibration: Path | None = None
    hub_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What clients of this service may ask for."""

    places: Places
    devices: tuple[str, ...]
    can_use_hub: bool = False


def run_options(spec: Mapping[str, Any], rules: Rules, places: Places, device: str) -> dict[str, str | bool]:
    """The options of `run` for the spec on `device`, with paths as `places` has them.

    Raises SpecRefused. What is named is looked for in `rules.places`; call it again right before the run,
    since files come and go.
    """
    options: dict[str, str | bool] = {"name": str(spec.get("name", "")), "artifacts": str(places.artifacts)}
    violations: list[tuple[str, str]] = []
    for check in (_source, _calibration, _values):
        try:
            options |= check(spec, rules, places)
        except SpecRefused as error:
            violations += error.violations
    options["device"] = device
    if not violations:
        violations = _violations_of_run(options)
    if violations:
        raise SpecRefused(violations)
    return options


def needs_network(spec: Mapping[str, Any]) -> bool:
    """Whether the source comes from the hub."""
    return "revision" in spec


def wanted_device(spec: Mapping[str, Any], rules: Rules) -> str:
    """ "" for any device, "cuda" for any GPU, or one of the service's. Raises SpecRefused."""
    wanted = str(spec.get("device", ""))
    has_gpu = any(device.startswith(_ANY_GPU) for device in rules.devices)
    if not wanted or wanted in rules.devices or (wanted == _ANY_GPU and has_gpu):
        return wanted
    raise SpecRefused([("device", f"{wanted[:40]!r} is none of {', '.join(rules.devices)}")])


def _source(spec: Mapping[str, Any], rules: Rules, places: Places) -> dict[str, str | bool]:
    text = str(spec.get("source", ""))
    if not needs_network(spec):
        return {"source": str(places.sources / _below(rules.places.sources, text, "source", is_file=False))}
    revision = str(spec["revision"])
    if not rules.can_use_hub:
        raise SpecRefused([("revision", "this service takes nothing from the hub")])
    if not _HUB_ID.fullmatch(text) or ".." in text:
        raise SpecRefused([("source", f"{text[:80]!r} is no id of a hub repository, as in owner/name")])
    if not _REVISION.fullmatch(revision):
        raise SpecRefused([("revision", f"{revision[:80]!r} is no commit: 40 hexadecimal digits")])
    cache: dict[str, str | bool] = {}
    if rules.places.hub_cache is not None and places.hub_cache is not None:
        cache["hub_cache"] = str(places.hub_cache)
    return {"source": text, "revision": revision} | cache


def _calibration(spec: Mapping[str, Any], rules: Rules, places: Places) -> dict[str, str | bool]:
    names = [str(name) for name in spec.get("calibration", ())]
    if not names:
        return {}
    if rules.places.calibration is None or places.calibration is None:
        raise SpecRefused([("calibration", "this service has no calibration root")])
    if len(names) > MAX_CALIBRATION_FILES:
        raise SpecRefused([("calibration", f"names more than {MAX_CALIBRATION_FILES} files")])
    paths: list[str] = []
    for index, name in enumerate(names):
        field = f"calibration[{index}]"
        if PATH_SEPARATOR in name:
            raise SpecRefused([(field, f"holds {PATH_SEPARATOR!r}, which separates files")])
        try:
            _, weight = split_weight(Path(name))
        except ValueError as error:
            raise SpecRefused([(field, str(error)[:MAX_PATH_CHARS])]) from error
        # Cut from the text as it came: a Path has dropped what it takes for superfluous, as in "a//b@2".
        text = name if weight is None else name[: name.rindex("@")]
        below = _below(rules.places.calibration, text, field, is_file=True)
        paths.append(str(places.calibration / below) + name[len(text) :])
    return {"calibration": PATH_SEPARATOR.join(paths)}


def _values(spec: Mapping[str, Any], _rules: Rules, _places: Places) -> dict[str, str | bool]:
    found: dict[str, str | bool] = {}
    for name, value in spec.items():
        if name in ("source", "name", "calibration", "revision", "device"):
            continue
        if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
            raise SpecRefused([(name, f"is longer than {MAX_TEXT_CHARS} characters")])
        if name.endswith("_tokens") and isinstance(value, int) and value > MAX_TOKENS:
            raise SpecRefused([(name, f"{value} is more than {MAX_TOKENS}")])
        if name == "max_perplexity_increase":
            found[name] = f"{100 * value:.12g}%"
        else:
            found[name] = value if isinstance(value, bool) else str(value)
    return found


def _violations_of_run(options: dict[str, str | bool]) -> list[tuple[str, str]]:
    """What the command itself would say to the options."""
    try:
        build_config(QuantizerConfig, options)
    except ConfigError as error:
        field = error.flag.removeprefix("--").replace("-", "_")
        return [(field, error.reason)]
    return []


def _below(root: Path, text: str, field: str, *, is_file: bool) -> Path:
    """The relative path, once it is certain that it stays below the root, links followed, and is there."""

    def refuse(reason: str) -> SpecRefused:
        return SpecRefused([(field, reason)])

    if not text:
        raise refuse("must be set")
    if len(text) > MAX_PATH_CHARS:
        raise refuse(f"is longer than {MAX_PATH_CHARS} characters")
    parts = text.rstrip("/").split("/")
    if not text.isprintable() or text.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise refuse(f"{text[:80]!r} is no path below the root that the service was given")
    relative = Path(*parts)
    try:
        real, real_root = os.path.realpath(root / relative), os.path.realpath(root)
    except (OSError, ValueError) as error:
        raise refuse(f"{text[:80]!r}: {error}") from error
    if os.path.commonpath([real, real_root]) != real_root:
        raise refuse(f"{text[:80]!r} leads out of the root that the service was given")
    if not (os.path.isfile(real) if is_file else os.path.isdir(real)):
        raise refuse(f"{text[:80]!r}: no such {'file' if is_file else 'directory'}")
    return relative
