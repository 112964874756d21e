"""The full-precision model, a block at a time: shapes checked before anything is computed, then loaded when
asked for.

Runs the layer classes of `transformers` itself, made on the meta device and called with the weights of the
moment, so no block exists in memory unless it is being worked on. No code is ever taken from the
checkpoint. This module does not know that anything is going to be quantized.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from services.quantizer.errors import QuantizerError
from services.quantizer.model_config import build_config, find_architecture, unusable
from services.quantizer.model_map import ARCHITECTURES
from services.quantizer.positions import Positions
from services.quantizer.stored_rows import join_rows, split_rows
from weft.artifact.checkpoint import Checkpoint, ReadableCheckpoint

Weights = dict[str, Tensor]
"""Parameters of a block in fp32, by their names relative to the block."""

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENS_PER_BATCH = 2048
_TOKENS_PER_EAGER_BATCH = 1024
"""Eager attention keeps the scores of all heads, more than once."""
_SCORE_COPIES = 3
VOCABULARY_SLICE = 16384


class Source:
    """An opened checkpoint of a known architecture.

    Attributes:
        checkpoint: the reader.
        architecture: its entry in the model map.
        num_blocks: decoder blocks.
        vocab_size, hidden_size, max_length: of the model.
        is_tied: whether the embedding is the head as well.
    """

    def __init__(
        self, directory: Path, device: torch.device, checkpoint: ReadableCheckpoint | None = None
    ) -> None:
        """`checkpoint`: what to read instead of opening `directory`."""
        where = directory / "config.json"
        opened = Checkpoint.open(directory, implemented=ARCHITECTURES) if checkpoint is None else checkpoint
        self.checkpoint: ReadableCheckpoint = opened
        self.architecture = find_architecture(self.checkpoint.config, where)
        self.device = device
        self._module = importlib.import_module(
            f"{self.architecture.module}.modeling_{self.architecture.family}"
        )
        self._config = build_config(self.architecture, self.checkpoint.config, where)
        self.num_blocks: int = self._config.num_hidden_layers
        self.vocab_size: int = self._config.vocab_size
        self.hidden_size: int = self._config.hidden_size
        self.max_length: int = self._config.max_position_embeddings
        self.is_tied: bool = bool(self._config.tie_word_embeddings)
        self._positions = self._try_classes(where)
        self._shapes = {name: tuple(p.shape) for name, p in self.block(0).named_parameters()}
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
        for full_name, names in self.stored_parameters(index).items():
            tensor = self.checkpoint.load(full_name).to(self.device, torch.float32)
            _require_finite(tensor, full_name)
            parts = split_rows(tensor, [self._shapes[name][0] for name in names], self._num_row_runs)
            weights.update(zip(names, parts, strict=True))
        return {name: weights[name] for name in self._shapes}

    def run_block(
        self, layer: nn.Module, weights: Weights, hidden: Tensor, *, in_place: bool = False
    ) -> Tensor:
        """`hidden` [windows, length, hidden_size] through a block; `in_place` the result replaces it."""
        output = hidden if in_place else torch.empty_like(hidden)
        index = int(layer.get_submodule("self_attn").layer_idx)
        for window, batch, positions in self.batches(hidden, index):
            output[window] = functional_call(layer, weights, (batch,), positions).to(output.device)
        return output

    def batches(self, hidden: Tensor, index: int) -> Iterator[tuple[slice, Tensor, dict[str, Any]]]:
        """Slices of windows that fit comfortably, on the device, with the arguments that tell block `index`
        their positions.
        """
        step = self._batch_size(hidden.shape[1])
        for begin in range(0, hidden.shape[0], step):
            window = slice(begin, begin + step)
            batch = hidden[window].to(self.device)
            yield window, batch, self._positions.arguments(index, batch)

    def score_bytes(self, length: int) -> int:
        """What attention over a batch of windows of `length` keeps of its scores; 0 unless it is eager."""
        if self.architecture.attention != "eager":
            return 0
        heads: int = self._config.num_attention_heads
        return 4 * _SCORE_COPIES * self._batch_size(length) * heads * length**2

    def _batch_size(self, length: int) -> int:
        is_eager = self.architecture.attention == "eager"
        return max(1, (_TOKENS_PER_EAGER_BATCH if is_eager else TOKENS_PER_BATCH) // length)

    def embed(self, token_ids: Tensor) -> Tensor:
        """fp32 hidden states [windows, length, hidden_size] of int64 `token_ids` [windows, length]."""
        hidden = self.outer(self.architecture.embedding)[token_ids].float()
        # As `transformers` in fp32; in bf16 it would round the factor as well (55.5 for 55.4256).
        return hidden * self.hidden_size**0.5 if self.architecture.scales_embedding else hidden

    def head(self) -> Head:
        """The final norm and the output projection."""
        with torch.device("meta"):
            norm = getattr(self._module, self.architecture.norm_class)(
                self.hidden_size, eps=self._config.rms_norm_eps
            )
        norm_weight = self.outer(self.architecture.final_norm).to(self.device, torch.float32)
        name = self.architecture.embedding if self.is_tied else self.architecture.head
        softcap = self._config.final_logit_softcapping if self.architecture.caps_logits else None
        return Head(norm, norm_weight, self.outer(name).to(self.device), softcap)

    def outer(self, name: str) -> Tensor:
        """A tensor outside of the blocks, in its stored dtype. Refuses values that are not finite."""
        tensor = self.checkpoint.load(name)
        for part in tensor.split(VOCABULARY_SLICE):  # a mask of all of it would be half as large again
            _require_finite(part, name)
        return tensor

    def full_name(self, index: int, name: str) -> str:
        """The checkpoint's name of a block's parameter or module; of several modules, separated by spaces,
        theirs.
        """
        return self.architecture.block_prefix.format(index=index) + self.architecture.stored_name(name)

    def stored_parameters(self, index: int) -> dict[str, tuple[str, ...]]:
        """The checkpoint's tensors of a block by full name, each with the block's parameters in it."""
        stored: dict[str, tuple[str, ...]] = {}
        for name in self._shapes:
            full_name = self.full_name(index, name)
            stored[full_name] = (*stored.get(full_name, ()), name)
        return stored

    def join_rows(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of the parameters that one tensor of the checkpoint holds, in its order."""
        return join_rows(parts, self._num_row_runs)

    @property
    def _num_row_runs(self) -> int:
        return int(self._config.num_key_value_heads)

    def outer_names(self) -> list[str]:
        """Tensors outside of the blocks, as the artifact keeps them."""
        names = [self.architecture.embedding, self.architecture.final_norm]
        return names if self.is_tied else [*names, self.architecture.head]

    def _try_classes(self, where: Path) -> Positions:
        """Make what is run, and run two tokens through a block without storage: what a configuration cannot
        mean shows here.
        """
        try:
            rotary = getattr(self._module, self.architecture.rotary_class)(self._config)
            positions = Positions(self.architecture, self._config, rotary)
            for index in (0, self.num_blocks - 1):
                batch = torch.zeros(1, 2, self.hidden_size)
                arguments = tree_map(_without_storage, positions.arguments(index, batch))
                self.block(index)(batch.to("meta"), **arguments)
        except Exception as error:  # KeyError for an unknown activation, ValueError, whatever a class raises
            raise unusable(where, error) from error
        return positions

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, ...]] = {
            self.architecture.embedding: (self.vocab_size, self.hidden_size),
            self.architecture.final_norm: (self.hidden_size,),
        }
        if not self.is_tied:
            expected[self.architecture.head] = (self.vocab_size, self.hidden_size)
        for index in range(self.num_blocks):
            for full_name, names in self.stored_parameters(index).items():
                num_rows = sum(self._shapes[name][0] for name in names)
                expected[full_name] = (num_rows, *self._shapes[names[0]][1:])
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
            family = self.checkpoint.config["architectures"][0]
            raise QuantizerError(f"tensor {unknown[0]}: not a part of {family} as configured")


class Head:
    """Final norm and output projection; the projection stays in its stored dtype and is widened a slice at
    a time. Logits are kept within `softcap` if there is one.
    """

    def __init__(
        self, norm: nn.Module, norm_weight: Tensor, projection: Tensor, softcap: float | None = None
    ) -> None:
        self._norm, self._norm_weight, self._projection = norm, norm_weight, projection
        self._softcap = softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [tokens, vocabulary] of `hidden` [tokens, hidden_size]."""
        hidden = hidden.to(self._projection.device)
        normed = functional_call(self._norm, {"weight": self._norm_weight}, (hidden,))
        slices = self._projection.split(VOCABULARY_SLICE)
        logits = torch.cat([normed @ part.float().T for part in slices], dim=-1)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


def _without_storage(argument: Any) -> Any:
    return argument.to("meta") if isinstance(argument, Tensor) else argument


def _require_finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise QuantizerError(f"tensor {name} holds values that are not finite")
