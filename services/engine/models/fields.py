"""Typed access to the fields of a config.json; every failure names the field.

Knows JSON values and limits; does not know what any field means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_LAYERS = 1024
MAX_DIMENSION = 1 << 20
MAX_VOCABULARY = 1 << 22
MAX_POSITIONS = 1 << 24


class ConfigError(ValueError):
    """The configuration cannot be served; the message names the field."""


class Fields:
    """Typed access to a config mapping; every failure is a ConfigError that names the field."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self.raw = raw
        self.where = where

    def error(self, name: str, text: str) -> ConfigError:
        """A ConfigError about one field."""
        return ConfigError(f"{self.where}: {name} {text}")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]; a missing or null field takes the default, or fails without one."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be an integer, found {value!r:.80}")
        if not low <= value <= high:
            raise self.error(name, f"must be between {low} and {high}, found {value}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"must be a number, found {value!r:.80}")
        if not math.isfinite(value) or value <= 0:
            raise self.error(name, f"must be finite and above zero, found {value}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false; null and missing take the default."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, found {value!r:.80}")
        return value

    def text(self, name: str, default: str) -> str:
        """A string; null and missing take the default."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, found {value!r:.80}")
        return value
