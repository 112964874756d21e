"""The full-precision model, a block at a time: shapes checked before anything is computed, then loaded when
asked for.

Runs the layer classes of `transformers` itself, made on the meta device and called with the weights of the
moment, so no block exists in memory unless it is being worked on. No code is ever taken from the
checkpoint. This module does not know that anything is going to be quantized.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from services.quantizer.errors import QuantizerError
from services.quantizer.model_map import ARCHITECTURES, Architecture
from weft.artifact.checkpoint import Checkpoint

Weights = dict[str, Tensor]
"""Parameters of a block in fp32, by their names relative to the block."""

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOKENS_PER_BATCH = 4096
_VOCABULARY_SLICE = 16384
_MAX_BLOCKS = 1024


class Source:
    """An opened checkpoint of a known architecture.

    Attributes:
        checkpoint: the reader.
        architecture: its entry in the model map.
        num_blocks: decoder blocks.
        vocab_size, hidden_size, max_length: of the model.
        is_tied: whether the embedding is the head as well.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.checkpoint = Checkpoint.open(directory)
        config = self.checkpoint.config
        self.architecture = _find_architecture(config, directory)
        self.device = device
        family = _family(self.architecture)
        self._module = importlib.import_module(f"{self.architecture.module}.modeling_{family}")
        self._config = _model_config(self.architecture, config, directory)
        self.num_blocks: int = self._config.num_hidden_layers
        self.vocab_size: int = self._config.vocab_size
        self.hidden_size: int = self._config.hidden_size
        self.max_length: int = self._config.max_position_embeddings
        self.is_tied: bool = bool(self._config.tie_word_embeddings)
        self._rotary = self._try_classes(directory / "config.json")
        self._check_tensors()

    @property
    def num_repeats(self) -> int:
        """Query heads per key-value head."""
        return int(self._config.num_attention_heads // self._config.num_key_value_heads)

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        size = getattr(self._config, "head_dim", None)
        return int(size or self._config.hidden_size // self._config.num_attention_heads)

    def block(self, index: int) -> nn.Module:
        """The layer of `transformers`, without storage; `run_block` calls it with weights."""
        with torch.device("meta"):
            layer: nn.Module = getattr(self._module, self.architecture.layer_class)(self._config, index)
        return layer.eval()

    def block_weights(self, index: int) -> Weights:
        """All parameters of a block in fp32 on the device. Refuses weights that are not finite."""
        weights: Weights = {}
        for name in _parameter_shapes(self.block(index)):
            full_name = self.full_name(index, name)
            tensor = self.checkpoint.load(full_name).to(self.device, torch.float32)
            _require_finite(tensor, full_name)
            weights[name] = tensor
        return weights

    def run_block(self, layer: nn.Module, weights: Weights, hidden: Tensor) -> Tensor:
        """`hidden` [windows, length, hidden_size] through a block; the result replaces nothing."""
        output = torch.empty_like(hidden)
        for window, batch, positions in self.batches(hidden):
            output[window] = functional_call(layer, weights, (batch,), positions).to(output.device)
        return output

    def batches(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, dict[str, Any]]]:
        """Slices of windows that fit comfortably, on the device, with the arguments that tell positions."""
        length = hidden.shape[1]
        step = max(1, _TOKENS_PER_BATCH // length)
        ids = torch.arange(length, device=self.device).unsqueeze(0)
        for begin in range(0, hidden.shape[0], step):
            window = slice(begin, begin + step)
            batch = hidden[window].to(self.device)
            rotary = self._rotary.to(self.device)(batch, ids)
            # No mask: every window is whole, and without one the attention is causal.
            yield window, batch, {"position_embeddings": rotary, "position_ids": ids, "attention_mask": None}

    def embed(self, token_ids: Tensor) -> Tensor:
        """fp32 hidden states [windows, length, hidden_size] of int64 `token_ids` [windows, length]."""
        return self.outer(self.architecture.embedding)[token_ids].float()

    def head(self) -> Head:
        """The final norm and the output projection."""
        with torch.device("meta"):
            norm = getattr(self._module, self.architecture.norm_class)(
                self.hidden_size, eps=self._config.rms_norm_eps
            )
        norm_weight = self.outer(self.architecture.final_norm).to(self.device, torch.float32)
        name = self.architecture.embedding if self.is_tied else self.architecture.head
        return Head(norm, norm_weight, self.outer(name).to(self.device))

    def outer(self, name: str) -> Tensor:
        """A tensor outside of the blocks, in its stored dtype. Refuses values that are not finite."""
        tensor = self.checkpoint.load(name)
        for part in tensor.split(_VOCABULARY_SLICE):  # a mask of all of it would be half as large again
            _require_finite(part, name)
        return tensor

    def full_name(self, index: int, name: str) -> str:
        """The checkpoint's name of a block's parameter or module."""
        return self.architecture.block_prefix.format(index=index) + name

    def outer_names(self) -> list[str]:
        """Tensors outside of the blocks, as the artifact keeps them."""
        names = [self.architecture.embedding, self.architecture.final_norm]
        return names if self.is_tied else [*names, self.architecture.head]

    def _try_classes(self, where: Path) -> nn.Module:
        """Make a block and the rotary embedding once: what a configuration cannot mean shows here."""
        try:
            self.block(0)
            rotary: nn.Module = getattr(self._module, self.architecture.rotary_class)(self._config)
        except Exception as error:  # KeyError for an unknown activation, ValueError, whatever a class raises
            raise _unusable(where, error) from error
        return rotary

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, ...]] = {
            self.architecture.embedding: (self.vocab_size, self.hidden_size),
            self.architecture.final_norm: (self.hidden_size,),
        }
        if not self.is_tied:
            expected[self.architecture.head] = (self.vocab_size, self.hidden_size)
        shapes = _parameter_shapes(self.block(0))
        for index in range(self.num_blocks):
            expected.update({self.full_name(index, name): shape for name, shape in shapes.items()})
        for name, shape in expected.items():
            found = self.checkpoint.shape(name)
            if found != shape:
                raise QuantizerError(
                    f"tensor {name}: shape {list(found)}, the configuration wants {list(shape)}"
                )
            if self.checkpoint.dtype(name) not in STORED_DTYPES:
                raise QuantizerError(f"tensor {name}: dtype {self.checkpoint.dtype(name)} is not supported")
        unknown = sorted(
            name
            for name in self.checkpoint.names - expected.keys()
            if not name.endswith("rotary_emb.inv_freq") and name != self.architecture.head
        )
        if unknown:
            family = _family(self.architecture)
            raise QuantizerError(f"tensor {unknown[0]}: not a part of {family} as configured")


class Head:
    """Final norm and output projection; the projection stays in its stored dtype and is widened a slice at
    a time.
    """

    def __init__(self, norm: nn.Module, norm_weight: Tensor, projection: Tensor) -> None:
        self._norm, self._norm_weight, self._projection = norm, norm_weight, projection

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [tokens, vocabulary] of `hidden` [tokens, hidden_size]."""
        hidden = hidden.to(self._projection.device)
        normed = functional_call(self._norm, {"weight": self._norm_weight}, (hidden,))
        slices = self._projection.split(_VOCABULARY_SLICE)
        return torch.cat([normed @ part.float().T for part in slices], dim=-1)


def _require_finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise QuantizerError(f"tensor {name} holds values that are not finite")


def _family(architecture: Architecture) -> str:
    return architecture.module.rsplit(".", 1)[1]


def _find_architecture(config: dict[str, Any], directory: Path) -> Architecture:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name not in ARCHITECTURES:
        raise QuantizerError(
            f"{directory / 'config.json'}: architecture {str(name)[:64]} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config") is not None:
        raise QuantizerError(f"{directory / 'config.json'}: the checkpoint is quantized already")
    return ARCHITECTURES[name]


_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": _MAX_BLOCKS,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "max_position_embeddings": 1 << 28,
}


def _model_config(architecture: Architecture, config: dict[str, Any], directory: Path) -> Any:
    where = directory / "config.json"
    for key, limit in _LIMITS.items():
        value = config.get(key, config.get("num_attention_heads") if key == "num_key_value_heads" else None)
        if type(value) is not int or not 1 <= value <= limit:
            raise QuantizerError(
                f"{where}: {key} is {str(value)[:32]}; expected an integer from 1 to {limit}"
            )
    for key in ("rope_theta", "rms_norm_eps"):
        value = config.get(key, 1.0)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise QuantizerError(f"{where}: {key} is {str(value)[:32]}; a positive number is expected")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise QuantizerError(f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads")
    if config.get("use_sliding_window"):
        raise QuantizerError(f"{where}: sliding window attention is not supported")
    package = importlib.import_module(f"{architecture.module}.configuration_{_family(architecture)}")
    try:
        built = getattr(package, architecture.config_class).from_dict(config)
    except Exception as error:  # whatever the class makes of hostile values, the reader gets one line
        raise _unusable(where, error) from error
    built._attn_implementation = "sdpa"
    return built


def _unusable(where: Path, error: Exception) -> QuantizerError:
    return QuantizerError(f"{where}: not usable: {' '.join(repr(error).split())[:200]}")


def _parameter_shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
