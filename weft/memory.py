"""The size formulas: weights, KV cache, blocks that fit, and when decoding turns from memory to arithmetic.

Pure arithmetic on a model's shape. It loads nothing, imports nothing outside the standard library, and
knows no device but by the three numbers of its data sheet. Users: the engine, which sizes its cache, and
`weft plan`, which prints.

Sizes are bytes. GB is 10^9 bytes (how weights are quoted), GiB is 2^30 (how memory is bought).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB = 10**9
GIB = 2**30
MIB = 2**20

# Bits of one K or V value. "auto" is the type of the activations, 16 bits on a GPU. What is below 16 bits
# carries two 16-bit numbers, a scale and a minimum, per token and KV head, for K and for V each.
KV_BITS: Mapping[str, int] = {
    "float32": 32,
    "auto": 16,
    "bfloat16": 16,
    "float16": 16,
    "fp8": 8,
    "int8": 8,
    "int4": 4,
}
KV_SCALE_BYTES: Mapping[str, int] = {"fp8": 4, "int8": 4, "int4": 4}

BLOCK_SIZES = (16, 32, 64, 128, 256)
WEIGHT_BITS = (4, 8, 16, 32)
SCALE_BITS = 16
MAX_SIZE = 2**40


class ShapeError(ValueError):
    """A config.json does not describe a decoder whose size can be computed."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of a Llama-like decoder: RMSNorm, grouped-query attention, gated feed-forward.

    `nominal_parameters` is the round number in the model's name; sizes "as quoted" are computed from it.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    norms_per_layer: int = 2
    nominal_parameters: int | None = None

    @property
    def linear_parameters(self) -> int:
        """Parameters of the decoder's linears: what 4-bit weights make smaller."""
        attention = 2 * self.num_heads * self.head_dim + 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def other_parameters(self) -> int:
        """Embeddings, output head, norms and biases: what stays in 16 bits."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.has_tied_embeddings else 2)
        norms = (self.norms_per_layer * self.num_layers + 1) * self.hidden_size
        norms += 2 * self.num_layers * self.head_dim if self.has_qk_norm else 0
        bias = (
            self.num_layers * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
            if self.has_qkv_bias
            else 0
        )
        return embeddings + norms + bias

    @property
    def num_parameters(self) -> int:
        """All parameters, counted."""
        return self.linear_parameters + self.other_parameters

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> ModelShape:
        """Read the shape from a Hugging Face config. Raises ShapeError naming the key at fault."""

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise ShapeError(f"config.json: {key} must be a positive integer, found {str(value)[:32]!r}")
            return value

        model_type = config.get("model_type")
        is_gemma = model_type in ("gemma2", "gemma3_text")
        head_dims = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
        num_heads = size("num_attention_heads")
        hidden_size = size("hidden_size")
        return cls(
            name=name,
            hidden_size=hidden_size,
            intermediate_size=size("intermediate_size"),
            num_layers=size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=size("num_key_value_heads", num_heads),
            head_dim=size("head_dim", head_dims.get(str(model_type), hidden_size // num_heads)),
            vocab_size=size("vocab_size"),
            has_tied_embeddings=bool(config.get("tie_word_embeddings", is_gemma)),
            has_qkv_bias=_has_qkv_bias(config),
            has_qk_norm=model_type in ("qwen3", "gemma3_text"),
            norms_per_layer=4 if is_gemma else 2,
        )

    @classmethod
    def from_file(cls, path: Path) -> ModelShape:
        """Read a config.json, or the one in a directory. Raises ShapeError, OSError."""
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ShapeError(f"{path}: not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ShapeError(f"{path}: not a JSON object")
        return cls.from_config(config, path.parent.name or str(path))


def _has_qkv_bias(config: Mapping[str, Any]) -> bool:
    """By the field that the family has for it, and what its absence means there."""
    model_type = config.get("model_type")
    fields = {"internlm2": "bias", "internlm3": "qkv_bias"}
    return bool(
        config.get(fields.get(str(model_type), "attention_bias"), model_type in ("qwen2", "internlm2"))
    )


@dataclass(frozen=True, slots=True)
class Device:
    """A device by its data sheet: dense fp16 tensor throughput, memory bandwidth, memory."""

    name: str
    flops: float  # per second, fp16 with fp32 sums, no sparsity
    bandwidth: float  # bytes per second
    memory: int  # bytes


PRESETS: Mapping[str, ModelShape] = {
    "llama-7b": ModelShape("llama-7b", 4096, 11008, 32, 32, 32, 128, 32000, nominal_parameters=7 * 10**9),
    "llama-70b": ModelShape("llama-70b", 8192, 28672, 80, 64, 8, 128, 32000, nominal_parameters=70 * 10**9),
}

DEVICES: Mapping[str, Device] = {
    "a100-40": Device("a100-40", 312e12, 1.555e12, 40 * GIB),
    "a100-80": Device("a100-80", 312e12, 2.039e12, 80 * GIB),
    "h100": Device("h100", 989e12, 3.35e12, 80 * GIB),
    "h200": Device("h200", 989e12, 4.8e12, 141 * GB),
}


def nominal_weight_bytes(shape: ModelShape, weight_bits: int) -> int:
    """Weights as quoted: the nominal parameter count, every parameter in `weight_bits`, no scales."""
    return (shape.nominal_parameters or shape.num_parameters) * weight_bits // 8


def bits_per_weight(weight_bits: int, group_size: int) -> float:
    """Bits that one weight of a linear takes; below 16, a group adds an fp16 scale and a zero point."""
    return weight_bits + (SCALE_BITS + weight_bits) / group_size if weight_bits < 16 else float(weight_bits)


def weight_bytes(shape: ModelShape, weight_bits: int, group_size: int = 128) -> int:
    """Weights as stored: linears in `weight_bits` with scales and zero points, the rest in 16 or more."""
    linears = shape.linear_parameters * bits_per_weight(weight_bits, group_size) / 8
    return math.ceil(linears) + shape.other_parameters * max(weight_bits, 16) // 8


def kv_bytes_per_token(
    num_layers: int, num_kv_heads: int, head_dim: int, kv_dtype: str = "auto", *, with_scales: bool = True
) -> int:
    """Bytes of K and V of one token: 2 x layers x kv_heads x (head_dim x bits / 8 + scale and minimum).

    Raises ShapeError when a head does not fill whole bytes.
    """
    if head_dim * KV_BITS[kv_dtype] % 8:
        raise ShapeError(f"{kv_dtype} K and V need an even head_dim, found {head_dim}")
    scale = KV_SCALE_BYTES.get(kv_dtype, 0) if with_scales else 0
    return 2 * num_layers * num_kv_heads * (head_dim * KV_BITS[kv_dtype] // 8 + scale)


def rows_until_compute_bound(device: Device, weight_bits: float = 16) -> float:
    """Rows at which reading a weight takes as long as using it.

    A linear of m rows does 2 m FLOP per weight and reads weight_bits / 8 bytes per weight, so both take
    equally long at m = flops / bandwidth x weight_bits / 16 (roofline model, Williams et al. 2009;
    activations, which are small beside the weights at these m, are left out). Below it decoding waits for
    memory, above it for arithmetic.
    """
    return device.flops / device.bandwidth * weight_bits / 16


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What fits where. `plan` makes it; every size is in bytes. `num_blocks` is what sequences can own; one
    block more is allocated, where rows that belong to nobody are written.
    """

    model: str
    num_parameters: int
    weight_bits: int
    nominal_weight_bytes: int
    weight_bytes: int
    kv_dtype: str
    kv_bytes_per_token: int
    kv_scale_bytes_per_token: int
    block_size: int
    block_bytes: int
    context: int
    batch: int
    kv_bytes_per_sequence: int
    kv_bytes_per_batch: int
    device: str
    device_memory: int
    memory_fraction: float
    num_blocks: int
    num_sequences: int
    compute_bound_rows: float

    @property
    def fits(self) -> bool:
        """Whether the weights and the KV cache of the whole batch fit."""
        return self.num_sequences >= self.batch


def plan(
    shape: ModelShape,
    *,
    device: Device,
    device_memory: int | None = None,
    memory_fraction: float = 0.9,
    weight_bits: int = 4,
    group_size: int = 128,
    kv_dtype: str = "auto",
    block_size: int = 128,
    context: int = 2048,
    batch: int = 8,
) -> MemoryPlan:
    """Compute how many KV blocks and whole sequences of `context` tokens fit beside the weights.

    `memory_fraction` of the device is used; the rest is for activations, workspace and the runtime.
    Sequences are counted in whole blocks, none shared. Raises ShapeError when the heads do not fit the kv
    dtype.
    """
    memory = device.memory if device_memory is None else device_memory
    weights = weight_bytes(shape, weight_bits, group_size)
    cache = (shape.num_layers, shape.num_kv_heads, shape.head_dim, kv_dtype)
    per_token = kv_bytes_per_token(*cache)
    block_bytes = per_token * block_size
    blocks_per_sequence = math.ceil(context / block_size)
    num_blocks = max(0, (int(memory * memory_fraction) - weights) // block_bytes - 1)
    return MemoryPlan(
        model=shape.name,
        num_parameters=shape.num_parameters,
        weight_bits=weight_bits,
        nominal_weight_bytes=nominal_weight_bytes(shape, weight_bits),
        weight_bytes=weights,
        kv_dtype=kv_dtype,
        kv_bytes_per_token=per_token,
        kv_scale_bytes_per_token=per_token - kv_bytes_per_token(*cache, with_scales=False),
        block_size=block_size,
        block_bytes=block_bytes,
        context=context,
        batch=batch,
        kv_bytes_per_sequence=blocks_per_sequence * block_bytes,
        kv_bytes_per_batch=batch * blocks_per_sequence * block_bytes,
        device=device.name,
        device_memory=memory,
        memory_fraction=memory_fraction,
        num_blocks=num_blocks,
        num_sequences=num_blocks // blocks_per_sequence,
        compute_bound_rows=rows_until_compute_bound(device, bits_per_weight(weight_bits, group_size)),
    )
