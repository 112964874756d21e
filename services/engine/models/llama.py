"""LlamaForCausalLM, whose layers are those of the whole family; relatives differ in what the class says of
itself and in how they are configured.

Knows the order of operations; names come from `Names`, weights through `WeightLoader`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from services.engine.kernels import ops
from services.engine.kernels.kv_format import LayerCache
from services.engine.kernels.linear import Linear
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.rope import rotary_tables
from services.engine.models.config import ModelConfig, parse_config
from services.engine.models.fields import Fields
from services.engine.models.layers import (
    Activation,
    Attention,
    DecoderLayer,
    GatedMlp,
    Rotation,
    StepContext,
)
from services.engine.models.names import Names
from services.engine.models.weights import WeightLoader


class Llama:
    """The decoder: embedding, layers, final norm, and logits of the rows that are asked for.

    `has_qk_norm`: whether each head of q and k is normalised before it is rotated. `norm_offset`: what is
    added to the stored weights of norms; they are then kept in fp32. `has_scaled_embedding`: whether a
    token's embedding is multiplied by sqrt(hidden_size), rounded to the activations' dtype.
    """

    names = Names()
    has_qk_norm = False
    norm_offset = 0.0
    activation: Activation = "silu"
    has_scaled_embedding = False

    def __init__(self, config: ModelConfig, loader: WeightLoader, max_model_len: int) -> None:
        self.config = config
        names, hidden = self.names, config.hidden_size
        self.embedding = loader.dense(f"{names.embedding}.weight", (config.vocab_size, hidden))
        self.layers = [self._load_layer(index, loader) for index in range(config.num_layers)]
        self.norm = self._norm(names.final_norm, hidden, loader)
        self.head = loader.head(self.embedding, f"{names.head}.weight")
        self._embedding_scale = float(torch.tensor(hidden**0.5, dtype=loader.numerics.dtype))
        self._rotations = self._rotations_for(max_model_len, loader.numerics.device)

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig."""
        fields = Fields(raw)
        has_bias = fields.boolean("attention_bias", False)
        return parse_config(
            raw,
            has_qkv_bias=has_bias,
            has_output_bias=has_bias,
            has_mlp_bias=fields.boolean("mlp_bias", False),
        )

    @staticmethod
    def qkv_order(config: ModelConfig) -> Tensor | None:
        """Which stored output of the one linear `names.qkv` is each of ours: all query heads, all keys, all
        values. None where they lie so.
        """
        return None

    def use(self, numerics: Numerics) -> None:
        """Change attention's tile sizes (the linears keep theirs)."""
        for layer in self.layers:
            layer.attention.numerics = numerics

    @contextmanager
    def serving(self, num_positions: int) -> Iterator[None]:
        """Turn, for a while, as a model does that is loaded for `num_positions`: with longrope, which chooses
        by them, not always as this one.
        """
        before = self._rotations
        if self.config.rope.kind == "longrope":
            self._rotations = self._rotations_for(num_positions, before[0].cos.device)
        try:
            yield
        finally:
            self._rotations = before

    def _rotations_for(self, num_positions: int, device: torch.device) -> tuple[Rotation, ...]:
        config = self.config
        ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
        return tuple(
            Rotation(*(table.to(device) for table in rotary_tables(rope, config.head_dim, num_positions)))
            for rope in ropes
        )

    @property
    def linears(self) -> dict[str, Linear]:
        """Every linear by a readable name, the head included."""
        named: dict[str, Linear] = {}
        for index, layer in enumerate(self.layers):
            named[f"layers.{index}.qkv"] = layer.attention.qkv
            named[f"layers.{index}.output"] = layer.attention.output
            named[f"layers.{index}.gate_up"] = layer.mlp.gate_up
            named[f"layers.{index}.down"] = layer.mlp.down
        return named | {"head": self.head}

    def forward(
        self,
        token_ids: Tensor,
        metadata: AttentionMetadata,
        caches: Sequence[LayerCache],
        logits_rows: Tensor,
    ) -> Tensor:
        """Compute a ragged batch.

        Args:
            token_ids: int64 [rows].
            metadata: its shape; positions must be below max_model_len.
            caches: K and V of each layer; written in place.
            logits_rows: int64 [n], the rows whose logits are wanted.

        Returns: fp32 logits [n, vocab].
        """
        positions = metadata.positions
        step = StepContext(
            metadata,
            tuple(
                Rotation(table.cos.index_select(0, positions), table.sin.index_select(0, positions))
                for table in self._rotations
            ),
        )
        x, residual = ops.embedding(token_ids, self.embedding), None
        if self.has_scaled_embedding:
            x = x * self._embedding_scale
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, step, cache)
        x = ops.gather_rows(x, logits_rows)
        if residual is None:
            raise RuntimeError("a model has at least one layer")
        normed, _ = ops.add_rms_norm(
            x, ops.gather_rows(residual, logits_rows), self.norm, self.config.rms_norm_eps
        )
        logits = ops.linear(normed, self.head).float()
        cap = self.config.logit_softcap
        return logits if cap is None else ops.softcap(logits, cap)

    def _load_layer(self, index: int, loader: WeightLoader) -> DecoderLayer:
        config, names = self.config, self.names
        prefix = names.block.format(index=index)
        hidden, width = config.hidden_size, config.intermediate_size

        def norm(name: str | None, size: int = hidden) -> Tensor | None:
            return None if name is None else self._norm(prefix + name, size, loader)

        return DecoderLayer(
            input_norm=self._norm(prefix + names.input_norm, hidden, loader),
            attention=self._load_attention(index, prefix, loader),
            attention_output_norm=norm(names.attention_output_norm),
            mlp_norm=self._norm(prefix + names.mlp_norm, hidden, loader),
            mlp=GatedMlp(
                gate_up=loader.linear(
                    {prefix + name: 2 * width // len(names.gate_up) for name in names.gate_up},
                    hidden,
                    config.has_mlp_bias,
                    is_gate_up=True,
                ),
                down=loader.linear({prefix + names.down: hidden}, width, config.has_mlp_bias),
                activation=self.activation,
            ),
            mlp_output_norm=norm(names.mlp_output_norm),
            eps=config.rms_norm_eps,
        )

    def _load_attention(self, index: int, prefix: str, loader: WeightLoader) -> Attention:
        config, names = self.config, self.names
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = (q_size, kv_size, kv_size) if len(names.qkv) == 3 else (q_size + 2 * kv_size,)
        qkv = {prefix + name: size for name, size in zip(names.qkv, sizes, strict=True)}
        window = config.layer_windows[index]
        return Attention(
            qkv=loader.linear(qkv, config.hidden_size, config.has_qkv_bias, order=self.qkv_order(config)),
            output=loader.linear({prefix + names.output: config.hidden_size}, q_size, config.has_output_bias),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            numerics=loader.numerics,
            scratch=loader.scratch,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            rotation=1 if window is not None and config.local_rope is not None else 0,
            sliding_window=window,
            q_norm=self._norm(prefix + names.q_norm, config.head_dim, loader) if self.has_qk_norm else None,
            k_norm=self._norm(prefix + names.k_norm, config.head_dim, loader) if self.has_qk_norm else None,
            eps=config.rms_norm_eps,
        )

    def _norm(self, name: str, size: int, loader: WeightLoader) -> Tensor:
        return loader.dense(f"{name}.weight", (size,), offset=self.norm_offset)
