"""LlamaForCausalLM, whose layers are those of the whole family; relatives differ in how they are configured.

Knows the parameter names and the order of operations; weights come through `WeightLoader`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from services.engine.kernels import ops
from services.engine.kernels.kv_format import LayerCache
from services.engine.kernels.linear import Linear
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.rope import rotary_tables
from services.engine.models.config import Fields, ModelConfig, parse_config
from services.engine.models.layers import Attention, DecoderLayer, GatedMlp, StepContext
from services.engine.models.weights import WeightLoader


class Llama:
    """The decoder: embedding, layers, final norm, and logits of the rows that are asked for.

    `has_qk_norm`: whether each head of q and k is normalised before it is rotated.
    """

    has_qk_norm = False

    def __init__(self, config: ModelConfig, loader: WeightLoader, max_model_len: int) -> None:
        self.config = config
        self.embedding = loader.dense("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self.layers = [self._load_layer(index, loader) for index in range(config.num_layers)]
        self.norm = loader.dense("model.norm.weight", (config.hidden_size,))
        self.head = loader.head(self.embedding)
        tables = rotary_tables(config.rope, config.head_dim, max_model_len)
        self._cos, self._sin = (table.to(loader.numerics.device) for table in tables)

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

    def use(self, numerics: Numerics) -> None:
        """Change attention's tile sizes (the linears keep theirs)."""
        for layer in self.layers:
            layer.attention.numerics = numerics

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
            metadata, self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        )
        x, residual = ops.embedding(token_ids, self.embedding), None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, step, cache)
        x = ops.gather_rows(x, logits_rows)
        if residual is None:
            raise RuntimeError("a model has at least one layer")
        normed, _ = ops.add_rms_norm(
            x, ops.gather_rows(residual, logits_rows), self.norm, self.config.rms_norm_eps
        )
        return ops.linear(normed, self.head).float()

    def _load_layer(self, index: int, loader: WeightLoader) -> DecoderLayer:
        config, prefix = self.config, f"model.layers.{index}."
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, width = config.hidden_size, config.intermediate_size
        attention = prefix + "self_attn."
        mlp = prefix + "mlp."
        qkv = {attention + "q_proj": q_size, attention + "k_proj": kv_size, attention + "v_proj": kv_size}
        return DecoderLayer(
            input_norm=loader.dense(prefix + "input_layernorm.weight", (hidden,)),
            attention=Attention(
                qkv=loader.linear(qkv, hidden, config.has_qkv_bias),
                output=loader.linear({attention + "o_proj": hidden}, q_size, config.has_output_bias),
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                numerics=loader.numerics,
                scratch=loader.scratch,
                sliding_window=config.layer_windows[index],
                q_norm=self._head_norm(attention + "q_norm", loader),
                k_norm=self._head_norm(attention + "k_norm", loader),
                eps=config.rms_norm_eps,
            ),
            post_attention_norm=loader.dense(prefix + "post_attention_layernorm.weight", (hidden,)),
            mlp=GatedMlp(
                gate_up=loader.linear(
                    {mlp + "gate_proj": width, mlp + "up_proj": width},
                    hidden,
                    config.has_mlp_bias,
                    is_gate_up=True,
                ),
                down=loader.linear({mlp + "down_proj": hidden}, width, config.has_mlp_bias),
            ),
            eps=config.rms_norm_eps,
        )

    def _head_norm(self, name: str, loader: WeightLoader) -> Tensor | None:
        return loader.dense(f"{name}.weight", (self.config.head_dim,)) if self.has_qk_norm else None
