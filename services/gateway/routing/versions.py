"""Which version of a model a request gets: by name, or by weight. Pure.

The weighted choice is a rendezvous (Thaler and Ravishankar, 1998; with weights: Schindelhauer and Schomaker,
2005): each version draws from the request's key and its own name, the best draw wins. The same key gets the
same version as long as that is there, and when weights move, no more keys move than must.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class VersionWeight(NamedTuple):
    """The share of a model's requests that one version gets, from 0 to 1."""

    model: str
    version: str
    share: float

    def __str__(self) -> str:
        return f"{self.model}@{self.version}={100 * self.share:g}%"


class Variant(NamedTuple):
    """One artifact that can be asked for now. `capacity` is the sequences its engines run at once."""

    model: str
    version: str
    digest: str
    capacity: int


def parse_version_weights(text: str) -> tuple[VersionWeight, ...]:
    """MODEL@VERSION=PERCENT%, or several with commas between. Raises ValueError."""
    found: dict[tuple[str, str], VersionWeight] = {}
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        name, equals, percent = part.rpartition("=")
        model, at, version = name.rpartition("@")
        if not (equals and at and model and version):
            raise ValueError(f"{part!r}: expected MODEL@VERSION=PERCENT%, as in demo@v2=5%")
        if (model, version) in found:
            raise ValueError(f"{name!r} is given twice")
        found[model, version] = VersionWeight(model, version, _share(percent))
    for model in {weight.model for weight in found.values()}:
        if sum(weight.share for weight in found.values() if weight.model == model) > 1 + 1e-9:
            raise ValueError(f"the versions of {model!r} have more than 100% together")
    return tuple(found.values())


def _share(text: str) -> float:
    digits = text.strip().removesuffix("%")
    try:
        percent = float(digits)
    except ValueError:
        percent = math.nan
    if not text.strip().endswith("%") or not 0 <= percent <= 100:
        raise ValueError(f"{text!r} is no percentage from 0% to 100%")
    return percent / 100


def split_name(name: str, models: Iterable[str]) -> tuple[str, str | None]:
    """Model and version of what a request names; no version when it names none. A model whose own name holds
    an @ is found before that is taken for a version.
    """
    if name in models:
        return name, None
    model, at, version = name.rpartition("@")
    return (model, version) if at else (name, None)


def choose(variants: Sequence[Variant], weights: Mapping[str, float], key: str) -> Variant | None:
    """The variant for a key, of those of one model; `weights` are by version. None when each has a weight of
    0.
    """
    best: Variant | None = None
    best_score = 0.0
    for variant, share in zip(variants, shares(variants, weights), strict=True):
        if share <= 0.0:
            continue
        score = share / -math.log(_draw(key, variant))
        if best is None or score > best_score:
            best, best_score = variant, score
    return best


def shares(variants: Sequence[Variant], weights: Mapping[str, float]) -> list[float]:
    """Each variant's share. A named version has its weight; what all the named ones leave goes to the others
    in proportion to what their engines can run at once. Only ratios count: what is not there gets nothing.
    """
    rest = max(0.0, 1.0 - sum(weights.values()))
    capacity = sum(variant.capacity for variant in variants if variant.version not in weights)
    return [
        weights[variant.version]
        if variant.version in weights
        else (rest * variant.capacity / capacity if capacity else 0.0)
        for variant in variants
    ]


def _draw(key: str, variant: Variant) -> float:
    """A number above 0 and below 1, the same in every process."""
    name = f"{variant.model}\0{variant.version}\0{variant.digest}\0{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 1) / (2**64 + 2)
