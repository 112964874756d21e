"""What config.json says about how a checkpoint was quantized, reduced to what its tensors cannot tell.

Knows the dialects of quantization_config; does not look at tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.quantizer.errors import QuantizerError
from services.quantizer.model_map import ARCHITECTURES

BITS = 4
PER_CHANNEL = -1
_MAX_GROUP_SIZE = 1 << 20
# Of compressed-tensors' activation orders those that leave the groups scattered.
_REORDERED = ("group", "dynamic", True)
METHODS = ("awq", "gptq", "compressed-tensors")
_HEADS = {known.head.removesuffix(".weight") for known in ARCHITECTURES.values()}


@dataclass(frozen=True, slots=True)
class Scheme:
    """What the tensors cannot say.

    Attributes:
        layout: gemm, gemv, gptq, gptq_v2 or pack-quantized.
        group_size: input channels per scale, PER_CHANNEL for one scale per row; None where the tensors'
            shapes say it (pack-quantized).
        has_zeros: whether every linear stores zero points (True), none does (False), or some do (None).
        full_precision: what config.json says was left alone; patterns are possible.
        has_order: whether inputs were taken in another order, so that nothing but a tensor of its own can
            say to which group each belongs.
    """

    layout: str
    group_size: int | None
    has_zeros: bool | None = True
    full_precision: tuple[str, ...] = ()
    has_order: bool = False


def parse_scheme(config: Mapping[str, Any], where: Path) -> Scheme:
    """The scheme of a parsed config.json. Raises QuantizerError, which names the field, for all that is not
    4-bit weights in a known layout.
    """
    raw = config.get("quantization_config")
    if not isinstance(raw, Mapping):
        raise QuantizerError(f"{where}: no quantization_config, so there is nothing to import; use run")
    method = raw.get("quant_method")
    if method == "awq":
        return _parse_awq(raw, where)
    if method == "gptq":
        return _parse_gptq(raw, where)
    if method == "compressed-tensors":
        return _parse_compressed_tensors(raw, where)
    raise _refuse(where, "quant_method", method, ", ".join(METHODS))


def _parse_awq(raw: Mapping[str, Any], where: Path) -> Scheme:
    version = raw.get("version", raw.get("format", "gemm"))
    layout = version.lower() if isinstance(version, str) else version
    if layout not in ("gemm", "gemv"):
        raise _refuse(where, "version", version, "gemm, gemv")
    if raw.get("zero_point", True) is not True:
        raise _refuse(where, "zero_point", raw["zero_point"], "true")
    _require_bits(raw.get("bits", raw.get("w_bit")), where, "bits")
    group_size = _group_size(raw.get("group_size", raw.get("q_group_size")), where, "group_size")
    return Scheme(layout, group_size, full_precision=_names(raw.get("modules_to_not_convert")))


def _parse_gptq(raw: Mapping[str, Any], where: Path) -> Scheme:
    layout = raw.get("checkpoint_format", raw.get("format", "gptq"))
    if layout not in ("gptq", "gptq_v2"):
        raise _refuse(where, "checkpoint_format", layout, "gptq, gptq_v2")
    _require_bits(raw.get("bits"), where, "bits")
    # Rules of their own for modules whose names match; those that are left out simply are not packed.
    rules = raw.get("dynamic") or {}
    for pattern, rule in rules.items() if isinstance(rules, Mapping) else ():
        if isinstance(rule, Mapping) and "bits" in rule:
            _require_bits(rule["bits"], where, f"dynamic[{pattern[:40]!r}].bits")
    group_size = _group_size(raw.get("group_size"), where, "group_size")
    return Scheme(layout, group_size, has_order=bool(raw.get("desc_act")) and group_size != PER_CHANNEL)


def _parse_compressed_tensors(raw: Mapping[str, Any], where: Path) -> Scheme:
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refuse(where, "config_groups", groups, "an object")
    for name, group in groups.items():
        field = f"config_groups.{name[:40]}"
        if not isinstance(group, Mapping):
            raise _refuse(where, field, group, "an object")
        layout = group.get("format") or raw.get("format")
        if layout != "pack-quantized":
            raise _refuse(where, "format", layout, "pack-quantized")
        for key in ("input_activations", "output_activations"):
            if group.get(key) is not None:
                raise _refuse(where, f"{field}.{key}", "a scheme", "null: weights alone")
        _check_weights(group.get("weights"), where, f"{field}.weights")
    if raw.get("kv_cache_scheme") is not None:
        raise _refuse(where, "kv_cache_scheme", "a scheme", "null")
    symmetric = {group["weights"].get("symmetric", True) for group in groups.values()}
    has_zeros = None if len(symmetric) > 1 else not symmetric.pop()
    left = tuple(name for name in _names(raw.get("ignore")) if name not in _HEADS)
    has_order = all(group["weights"].get("actorder") in _REORDERED for group in groups.values())
    return Scheme("pack-quantized", None, has_zeros, left, has_order)


def _check_weights(weights: Any, where: Path, field: str) -> None:
    if not isinstance(weights, Mapping):
        raise _refuse(where, field, weights, "an object")
    _require_bits(weights.get("num_bits"), where, f"{field}.num_bits")
    for key, default, accepted in (
        ("type", "int", ("int",)),
        ("strategy", None, ("group", "channel")),
        ("dynamic", False, (False,)),
        ("symmetric", True, (True, False)),
    ):
        if weights.get(key, default) not in accepted:
            raise _refuse(where, f"{field}.{key}", weights.get(key), ", ".join(map(str, accepted)))


def _require_bits(value: Any, where: Path, field: str) -> None:
    if type(value) is not int or value != BITS:
        raise _refuse(where, field, value, str(BITS))


def _group_size(value: Any, where: Path, field: str) -> int:
    if type(value) is not int or not (value == PER_CHANNEL or 1 <= value <= _MAX_GROUP_SIZE):
        raise _refuse(where, field, value, f"{PER_CHANNEL} or 1 to {_MAX_GROUP_SIZE}")
    return value


def _names(value: Any) -> tuple[str, ...]:
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()


def _refuse(where: Path, field: str, found: Any, accepted: str) -> QuantizerError:
    return QuantizerError(
        f"{where}: quantization_config: {field} is {str(found)[:60]!r}; accepted: {accepted}"
    )
