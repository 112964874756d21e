"""config.json of a checkpoint, validated field by field into a ModelConfig.

Knows the Hugging Face field names and their limits. Does not read files and does not know tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.engine.kernels.rope import RopeConfig
from services.engine.models.fields import (
    MAX_DIMENSION,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    ConfigError,
    Fields,
)
from services.engine.models.quantization import QuantizationConfig, parse_quantization
from services.engine.models.rope_fields import parse_rope

MAX_EOS_IDS = 64


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder-only model of the Llama family is made of.

    `layer_windows`: how many keys, itself among them, a row of each layer sees; None means all. `local_rope`:
    the rotation of layers with a window, where it is another one. `attention_scale`: what q.k is multiplied
    by. A softcap c makes c * tanh(x / c) of a score, or of a logit.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    layer_windows: tuple[int | None, ...]
    stored_dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig | None
    attention_scale: float
    local_rope: RopeConfig | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The single entry of `architectures`."""
    value = raw.get("architectures")
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], str):
        raise ConfigError(f"config.json: architectures must name exactly one class, found {value!r:.120}")
    return value[0]


def parse_config(
    raw: Mapping[str, Any],
    *,
    has_qkv_bias: bool,
    has_output_bias: bool,
    has_mlp_bias: bool,
    layer_windows: tuple[int | None, ...] = (),
    default_head_dim: int | None = None,
    activation_field: str = "hidden_act",
    activations: tuple[str, ...] = ("silu", "swish"),
    rope: RopeConfig | None = None,
) -> ModelConfig:
    """The fields common to the family; the architecture's own module has decided the keyword arguments. No
    `layer_windows` means that no layer has one; the first of `activations` is that of a missing field.
    """
    fields = Fields(raw)
    hidden = fields.integer("hidden_size", 1, MAX_DIMENSION)
    heads = fields.integer("num_attention_heads", 1, MAX_DIMENSION)
    kv_heads = fields.integer("num_key_value_heads", 1, MAX_DIMENSION, default=heads)
    if kv_heads > heads or heads % kv_heads:
        raise fields.error(
            "num_key_value_heads", f"must divide num_attention_heads {heads}, found {kv_heads}"
        )
    if raw.get("head_dim") is None and default_head_dim is None and hidden % heads:
        raise fields.error("num_attention_heads", f"must divide hidden_size {hidden}, found {heads}")
    head_dim = fields.integer("head_dim", 2, 1024, default=default_head_dim or hidden // heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for rotary embedding, found {head_dim}")
    activation = fields.text(activation_field, activations[0])
    if activation not in activations:
        raise fields.error(activation_field, f"{activation!r} is not supported ({activations[0]} is)")
    vocab_size = fields.integer("vocab_size", 2, MAX_VOCABULARY)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    return ModelConfig(
        architecture=architecture_of(raw),
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_DIMENSION),
        max_position=fields.integer("max_position_embeddings", 1, MAX_POSITIONS),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope or parse_rope(fields),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        has_qkv_bias=has_qkv_bias,
        has_output_bias=has_output_bias,
        has_mlp_bias=has_mlp_bias,
        layer_windows=layer_windows or (None,) * num_layers,
        stored_dtype=_parse_dtype(fields),
        bos_token_id=_parse_bos(fields, vocab_size),
        eos_token_ids=parse_eos_ids(raw.get("eos_token_id"), vocab_size, "config.json"),
        quantization=parse_quantization(raw.get("quantization_config")),
        attention_scale=head_dim**-0.5,
    )


def parse_layer_windows(fields: Fields) -> tuple[int | None, ...]:
    """The windows of the Qwen family: none unless `use_sliding_window`; then `sliding_window` in the layers
    that `layer_types` names, or from layer `max_window_layers` on (transformers' defaults for what is
    missing).
    """
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    window = None
    if fields.boolean("use_sliding_window", False):
        window = parse_window(fields)
    if fields.raw.get("layer_types") is None:
        first = fields.integer("max_window_layers", 0, MAX_POSITIONS, default=28)
        return tuple(window if index >= first else None for index in range(num_layers))
    return parse_layer_types(fields, num_layers, window)


def parse_layer_types(fields: Fields, num_layers: int, window: int | None) -> tuple[int | None, ...]:
    """`layer_types`: the window of each layer that is said to have one."""
    kinds = fields.raw.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"must name {num_layers} layers, found {kinds!r:.80}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.error("layer_types", f"{kind!r:.40} is neither full_attention nor sliding_attention")
        if kind == "sliding_attention" and window is None:
            raise fields.error("layer_types", "has sliding_attention, but there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def parse_window(fields: Fields) -> int | None:
    """`sliding_window`: null is none, a missing one 4096, as in transformers."""
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        return None
    return fields.integer("sliding_window", 1, MAX_POSITIONS, default=4096)


def _parse_dtype(fields: Fields) -> str:
    name = fields.text("dtype", fields.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise fields.error("torch_dtype", f"{name!r} is not supported (float32, float16 and bfloat16 are)")
    return name


def _parse_bos(fields: Fields, vocab_size: int) -> int | None:
    if fields.raw.get("bos_token_id") is None:
        return None
    return fields.integer("bos_token_id", 0, vocab_size - 1)


def parse_eos_ids(value: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    """One id, a list of ids, or null, as ascending ids."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > MAX_EOS_IDS:
        raise ConfigError(f"{where}: eos_token_id lists {len(ids)} ids, at most {MAX_EOS_IDS} are supported")
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"{where}: eos_token_id {token_id!r:.40} is not an id below vocab_size {vocab_size}"
            )
    return tuple(sorted(set(ids)))
