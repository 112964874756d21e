"""quantization_config of config.json, validated field by field.

Knows AutoAWQ gemm and compressed-tensors pack-quantized, both with 4-bit weights and nothing else quantized.
Does not know tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.engine.models.fields import MAX_DIMENSION, ConfigError, Fields

_WHERE = "config.json: quantization_config"
PER_CHANNEL = -1


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How the 4-bit linears of a checkpoint are stored: `layout` gemm or pack-quantized. `group_size` -1: one
    scale per output. Without `has_zeros` no zero points are stored.
    """

    group_size: int
    modules_to_not_convert: tuple[str, ...] = ()
    layout: str = "gemm"
    has_zeros: bool = True


def parse_quantization(raw: Any) -> QuantizationConfig | None:
    """None for a checkpoint in full precision. Raises ConfigError."""
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{_WHERE} must be an object, found {raw!r:.80}")
    fields = Fields(raw, _WHERE)
    method = fields.text("quant_method", "")
    if method == "awq":
        return _parse_awq(fields)
    if method == "compressed-tensors":
        return _parse_compressed_tensors(fields)
    raise fields.error("quant_method", f"{method!r} is not supported (awq and compressed-tensors are)")


def _parse_awq(fields: Fields) -> QuantizationConfig:
    raw = fields.raw
    version = fields.text("version", "gemm").lower()
    if version != "gemm":
        raise fields.error("version", f"{version!r} is not supported (gemm is)")
    _require_four(fields, "bits" if "bits" in raw else "w_bit")
    group_size = _group_size(fields, "group_size" if "group_size" in raw else "q_group_size")
    if not fields.boolean("zero_point", True):
        raise fields.error("zero_point", "must be true")
    return QuantizationConfig(group_size, _names(fields, "modules_to_not_convert"))


def _parse_compressed_tensors(fields: Fields) -> QuantizationConfig:
    groups = fields.raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.error("config_groups", f"must be an object, found {groups!r:.80}")
    if fields.raw.get("kv_cache_scheme") is not None:
        raise fields.error("kv_cache_scheme", "is not supported")
    ignored = _names(fields, "ignore")
    found = {
        _parse_group(fields, Fields(group if isinstance(group, Mapping) else {}, f"{_WHERE}: {name!s:.40}"))
        for name, group in groups.items()
    }
    if len(found) > 1:
        raise fields.error("config_groups", "differ, which is not supported")
    group_size, has_zeros = found.pop()
    return QuantizationConfig(group_size, ignored, "pack-quantized", has_zeros)


def _parse_group(outer: Fields, group: Fields) -> tuple[int, bool]:
    """(group size, has zeros) of one of the config_groups."""
    layout = group.text("format", outer.text("format", ""))
    if layout != "pack-quantized":
        raise group.error("format", f"{layout!r} is not supported (pack-quantized is)")
    for name in ("input_activations", "output_activations"):
        if group.raw.get(name) is not None:
            raise group.error(name, "must be null: weights alone may be quantized")
    weights = group.raw.get("weights")
    if not isinstance(weights, Mapping):
        raise group.error("weights", f"must be an object, found {weights!r:.80}")
    fields = Fields(weights, f"{group.where}: weights")
    _require_four(fields, "num_bits")
    kind = fields.text("type", "int")
    if kind != "int":
        raise fields.error("type", f"{kind!r} is not supported (int is)")
    strategy = fields.text("strategy", "group")
    if strategy not in ("group", "channel"):
        raise fields.error("strategy", f"{strategy!r} is not supported (group and channel are)")
    group_size = PER_CHANNEL if strategy == "channel" else _group_size(fields, "group_size")
    return group_size, not fields.boolean("symmetric", True)


def _require_four(fields: Fields, name: str) -> None:
    bits = fields.integer(name, 1, 64)
    if bits != 4:
        raise fields.error(name, f"must be 4, found {bits}")


def _group_size(fields: Fields, name: str) -> int:
    group_size = fields.integer(name, PER_CHANNEL, MAX_DIMENSION)
    if group_size != PER_CHANNEL and (group_size < 2 or group_size % 2):
        raise fields.error(name, f"must be even and above zero, or -1, found {group_size}")
    return group_size


def _names(fields: Fields, name: str) -> tuple[str, ...]:
    names = fields.raw.get(name) or []
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise fields.error(name, "must be a list of strings")
    return tuple(names)
