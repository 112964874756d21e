"""Callers, and the file that names them: what each key may do. Knows no key, no method and no model.

A line is `name:sha256hex` and then options, all of them optional, each at most once:

    me:ab12...  models=demo,other@v2 methods=Generate,ListModels requests_per_second=5
    tokens_per_minute=10000 max_streams=4 weight=2

(on one line). Blank lines and lines that begin with `#` are skipped. An option that is not known is refused,
not skipped: a limit that is misspelt would be none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_KEY_FILE_BYTES = 1 << 20
MAX_LISTED = 256
MAX_RATE = 1e12
_ID = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")
_MODEL = re.compile(r"[^\s,@=\x00-\x1f\x7f]{1,256}(?:@[^\s,@=\x00-\x1f\x7f]{1,256})?")
_METHOD = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")


class KeyFileError(ValueError):
    """An API key file that cannot be used. Names the line, never what it holds."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what the key allows. `name` None: the server asks for no keys.

    `models` and `methods` None allow all; a model is its name, or `name@version` for that version alone; a
    method is its bare name, as in "Generate". The limits of None do not limit. `weight` is the share of the
    key among the others when requests must wait. `key_id` tells two keys apart that have had one name.
    """

    name: str | None = None
    models: frozenset[str] | None = None
    methods: frozenset[str] | None = None
    requests_per_second: float | None = None
    tokens_per_minute: float | None = None
    max_streams: int | None = None
    weight: float = 1.0
    key_id: str = field(default="", compare=False, repr=False)

    def may_call(self, method: str) -> bool:
        """Whether the key allows a method, named bare or by its full path."""
        return self.methods is None or method.rpartition("/")[2] in self.methods

    def may_use(self, model: str, version: str) -> bool:
        """Whether the key allows one version of a model."""
        return self.models is None or model in self.models or f"{model}@{version}" in self.models


ANYBODY = Caller()


def _names(pattern: re.Pattern[str]) -> Callable[[str], frozenset[str]]:
    def parse(text: str) -> frozenset[str]:
        names = text.split(",")
        if len(names) > MAX_LISTED or not all(pattern.fullmatch(name) for name in names):
            raise ValueError
        return frozenset(names)

    return parse


def _rate(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 < value <= MAX_RATE):
        raise ValueError
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise ValueError
    return int(text)


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "models": _names(_MODEL),
    "methods": _names(_METHOD),
    "requests_per_second": _rate,
    "tokens_per_minute": _rate,
    "max_streams": _count,
    "weight": _rate,
}
OPTION_NAMES = tuple(_OPTIONS)


def parse_options(words: list[str]) -> dict[str, Any]:
    """The fields of a Caller that `name=value` words stand for. Raises KeyFileError, which names an option
    that is known and nothing else.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in _OPTIONS:
            raise KeyFileError(f"an option that is none of {', '.join(_OPTIONS)}")
        if name in found:
            raise KeyFileError(f"{name} is there twice")
        try:
            found[name] = _OPTIONS[name](text)
        except ValueError:
            raise KeyFileError(f"{name} has a bad value") from None
    return found


def parse_key_file(data: bytes) -> dict[str, Caller]:
    """SHA-256 in hex -> whose key it is. Raises KeyFileError."""
    if len(data) > MAX_KEY_FILE_BYTES:
        raise KeyFileError(f"larger than {MAX_KEY_FILE_BYTES} bytes")
    callers: dict[str, Caller] = {}
    names: set[str] = set()
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        match = _ID.fullmatch(words[0])
        if match is None:
            raise KeyFileError(f"line {number}: not `name:sha256hex`")
        name, digest = match.groups()
        if name in names or digest in callers:
            raise KeyFileError(f"line {number}: the name or the key is there already")
        try:
            callers[digest] = Caller(name, key_id=digest[:16], **parse_options(words[1:]))
        except KeyFileError as error:
            raise KeyFileError(f"line {number}: {error}") from None
        names.add(name)
    if not callers:
        raise KeyFileError("no key in it: every call would be refused")
    return callers
