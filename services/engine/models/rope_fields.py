"""The fields of a config.json that say how positions become angles, as a RopeConfig.

Knows where checkpoints of several ages keep them. Does not compute an angle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from services.engine.kernels.rope import RopeConfig
from services.engine.models.fields import MAX_POSITIONS, Fields

_KINDS = ("default", "linear", "llama3", "dynamic")
_LONGROPE_NAMES = ("longrope", "su", "yarn")
"""What checkpoints of Phi-3 call it; with them "yarn" is not YaRN."""


def parse_rope(fields: Fields, *, default_theta: float = 10000.0) -> RopeConfig:
    """rope_theta and rope_scaling, or both within rope_parameters as newer checkpoints have it; all of a head
    turns.
    """
    name, scaling = _scaling(fields)
    partial = scaling.get("partial_rotary_factor", fields.raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise fields.error("partial_rotary_factor", f"{partial!r:.40} is not supported (1 is)")
    theta = _theta(fields, scaling, name, default_theta)
    return _scaled(Fields(scaling, f"config.json: {name}"), theta)


def parse_partial_rope(fields: Fields, head_dim: int) -> RopeConfig:
    """Phi-3's: the first `partial_rotary_factor` of a head turns; "longrope" may scale its frequencies."""
    name, scaling = _scaling(fields)
    inner = Fields(scaling, f"config.json: {name}")
    theta = _theta(fields, scaling, name, 10000.0)
    holder = inner if "partial_rotary_factor" in scaling else fields
    partial = holder.number("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * partial)
    if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise fields.error(
            "partial_rotary_factor", f"{partial} of head_dim {head_dim} is no even number up to it"
        )
    kind = _kind(inner)
    if kind == "default":
        return RopeConfig(theta, rotary_dim=rotary_dim)
    if kind not in _LONGROPE_NAMES:
        raise inner.error("rope_type", f"{kind!r} is not supported (default and longrope are)")
    # The outer field comes first, as in transformers.
    holder = fields if fields.raw.get("original_max_position_embeddings") is not None else inner
    original = holder.integer("original_max_position_embeddings", 2, MAX_POSITIONS, default=4096)
    extent = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    factor = inner.number("factor", extent / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeConfig(
        theta,
        "longrope",
        factor,
        original_max_position=original,
        rotary_dim=rotary_dim,
        short_factors=_factors(inner, "short_factor", rotary_dim // 2),
        long_factors=_factors(inner, "long_factor", rotary_dim // 2),
        attention_factor=inner.number("attention_factor", usual),
    )


def parse_layer_ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Gemma 3's two: of layers that see all, and of those with a window."""
    nested = fields.raw.get("rope_parameters")
    if nested is None:
        rope = parse_rope(fields, default_theta=1_000_000.0)
        return rope, RopeConfig(fields.number("rope_local_base_freq", 10000.0))
    found = []
    for kind, theta in (("full_attention", 1_000_000.0), ("sliding_attention", 10000.0)):
        inner = nested.get(kind) if isinstance(nested, Mapping) else None
        if not isinstance(inner, Mapping):
            raise fields.error("rope_parameters", f"must have an object {kind}, found {nested!r:.80}")
        where = Fields(inner, f"config.json: rope_parameters: {kind}")
        found.append(_scaled(where, where.number("rope_theta", theta)))
    return found[0], found[1]


def _scaling(fields: Fields) -> tuple[str, Mapping[str, Any]]:
    """(the field's name, its content): empty where there is none."""
    nested = fields.raw.get("rope_parameters")
    scaling = nested if nested is not None else fields.raw.get("rope_scaling")
    name = "rope_parameters" if nested is not None else "rope_scaling"
    if scaling is None:
        return name, {}
    if not isinstance(scaling, Mapping):
        raise fields.error(name, f"must be an object, found {scaling!r:.80}")
    for key, value in scaling.items():
        if isinstance(value, Mapping):
            raise fields.error(name, f"has a rope of its own for {key!r:.40}, which is not supported")
    return name, scaling


def _theta(fields: Fields, scaling: Mapping[str, Any], name: str, default: float) -> float:
    holder = Fields(scaling, f"config.json: {name}") if "rope_theta" in scaling else fields
    return holder.number("rope_theta", default)


def _kind(inner: Fields) -> str:
    return inner.text("rope_type", inner.text("type", "default"))


def _scaled(inner: Fields, theta: float) -> RopeConfig:
    """The scalings of whole heads."""
    kind = _kind(inner)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "dynamic":
        # It differs from plain rotation beyond max_position_embeddings alone, and no context goes there.
        inner.number("factor", 1.0)
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=inner.number("factor"))
    if kind != "llama3":
        raise inner.error("rope_type", f"{kind!r} is not supported ({', '.join(_KINDS)} are)")
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if low >= high:
        raise inner.error("low_freq_factor", f"must be below high_freq_factor {high}, found {low}")
    original = inner.integer("original_max_position_embeddings", 1, MAX_POSITIONS)
    return RopeConfig(theta, kind, inner.number("factor"), low, high, original)


def _factors(inner: Fields, name: str, count: int) -> tuple[float, ...]:
    """A list of `count` numbers above zero."""
    value = inner.raw.get(name)
    if not isinstance(value, list) or len(value) != count:
        raise inner.error(name, f"must list {count} numbers, found {value!r:.80}")
    for number in value:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number) or number <= 0:
            raise inner.error(name, f"must list finite numbers above zero, found {number!r:.40}")
    return tuple(float(number) for number in value)
