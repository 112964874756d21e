"""config.json of a checkpoint as a configuration of `transformers`: what cannot be meant, or is not covered,
is refused by name before any class sees it.

This module does not know tensors.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from services.quantizer.errors import QuantizerError
from services.quantizer.model_map import ARCHITECTURES, Architecture

_MAX_BLOCKS = 1024
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": _MAX_BLOCKS,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "max_position_embeddings": 1 << 28,
    "head_dim": 1 << 14,
    "sliding_window": 1 << 28,
    "original_max_position_embeddings": 1 << 28,
}
_MAY_BE_ABSENT = ("num_key_value_heads", "head_dim", "sliding_window", "original_max_position_embeddings")
_POSITIVE = (
    "rope_theta", "rope_local_base_freq", "rms_norm_eps", "query_pre_attn_scalar", "final_logit_softcapping",
    "attn_logit_softcapping",
)  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su")
"""Of `transformers`, and longrope's old name. "dynamic" turns by other angles only beyond the model's
context, which no text of a run reaches.
"""
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NOT_PASSED_ON = (
    "auto_map", "model_type", "attn_implementation", "_attn_implementation",
    "num_labels", "id2label", "label2id",
)  # fmt: skip
"""What no decoder needs. A name is made up for each of num_labels, which a file may put at 10^12."""


def find_architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    """The entry of the model map for a parsed config.json. Raises QuantizerError."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name not in ARCHITECTURES:
        raise QuantizerError(
            f"{where}: architecture {str(name)[:64]} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config") is not None:
        raise QuantizerError(f"{where}: the checkpoint is quantized already; `import` takes it as it is")
    return ARCHITECTURES[name]


def build_config(architecture: Architecture, config: Mapping[str, Any], where: Path) -> Any:
    """The configuration object of `transformers`. Raises QuantizerError naming the field."""
    _check_numbers(config, where)
    for name in architecture.unsupported:
        if config.get(name):
            raise QuantizerError(f"{where}: {name} is not supported for this architecture")
    _check_rope(config, where)
    # A deep copy: the classes write into the objects they are given.
    values = {key: deepcopy(value) for key, value in config.items() if key not in _NOT_PASSED_ON}
    for name, (stored, default) in architecture.config_fields.items():
        values[name] = config.get(stored, config.get(name, default))
        if not isinstance(values[name], bool):
            raise QuantizerError(f"{where}: {stored} is {str(values[name])[:32]}; true or false is expected")
    if "mlp_bias" in architecture.config_fields and values["attention_bias"] != values["mlp_bias"]:
        raise QuantizerError(f"{where}: qkv_bias and bias differ, which is not supported")
    package = importlib.import_module(f"{architecture.module}.configuration_{architecture.family}")
    try:
        built = getattr(package, architecture.config_class).from_dict(values)
    except Exception as error:  # whatever the class makes of hostile values, the reader gets one line
        raise unusable(where, error) from error
    built._attn_implementation = architecture.attention
    _check_layer_types(architecture, built, where)
    return built


def unusable(where: Path, error: Exception) -> QuantizerError:
    """What a class of `transformers` could not take, in one line."""
    return QuantizerError(f"{where}: not usable: {' '.join(repr(error).split())[:200]}")


def _check_numbers(config: Mapping[str, Any], where: Path) -> None:
    for key, limit in _LIMITS.items():
        value = config.get(key)
        if value is None and key in _MAY_BE_ABSENT:
            continue
        if type(value) is not int or not 1 <= value <= limit:
            raise QuantizerError(
                f"{where}: {key} is {str(value)[:32]}; expected an integer from 1 to {limit}"
            )
    for key in _POSITIVE:
        value = config.get(key, 1.0)
        if value is None and key.endswith("softcapping"):
            continue
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise QuantizerError(f"{where}: {key} is {str(value)[:32]}; a positive number is expected")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise QuantizerError(f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads")


def _check_rope(config: Mapping[str, Any], where: Path) -> None:
    """Every rope type that is named, in the old fields and in the new, per layer type or not."""
    for key in ("rope_scaling", "rope_parameters"):
        document = config.get(key)
        if document is None:
            continue
        if not isinstance(document, dict):
            raise QuantizerError(f"{where}: {key} is {str(document)[:32]}; an object is expected")
        for part in (document, *(document[kind] for kind in _LAYER_TYPES if document.get(kind))):
            kind = part.get("rope_type", part.get("type", "default")) if isinstance(part, dict) else part
            if kind not in ROPE_TYPES:
                raise QuantizerError(
                    f"{where}: {key} of type {str(kind)[:32]} is not supported; "
                    f"supported: {', '.join(ROPE_TYPES)}"
                )


def _check_layer_types(architecture: Architecture, built: Any, where: Path) -> None:
    if architecture.windows != "by type":
        return
    kinds = built.layer_types
    if len(kinds) != built.num_hidden_layers or not set(kinds).issubset(_LAYER_TYPES):
        raise QuantizerError(
            f"{where}: layer_types must name {built.num_hidden_layers} layers, "
            f"each {' or '.join(_LAYER_TYPES)}"
        )
    if "sliding_attention" in kinds and built.sliding_window is None:
        raise QuantizerError(f"{where}: layer_types has sliding_attention, but there is no sliding_window")
