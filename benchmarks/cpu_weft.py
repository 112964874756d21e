"""Weft's side of the comparison on a CPU: a whole engine with random 4-bit weights of a given shape.

`make_engine` builds it without a file: tensors are drawn when the loader asks for them. Times are of whole
steps of EngineCore: scheduling, forward, sampling. Knows no other library.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.engine.application import make_core
from services.engine.config import load
from services.engine.core.engine_core import EngineCore
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.runner.config import RunnerConfig
from services.engine.runner.model_runner import load_from
from services.engine.runner.source import Source
from weft.artifact.packing import pack_int4


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama; the defaults are TinyLlama-1.1B's."""

    hidden_size: int = 2048
    num_layers: int = 22
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 5632
    vocab_size: int = 32000
    group_size: int = 128
    max_positions: int = 2048


class RandomCheckpoint:
    """Reads like an opened AutoAWQ checkpoint; what it holds is drawn from a seed by each tensor's name."""

    directory = Path("random")
    files = ()

    def __init__(self, shape: Shape) -> None:
        self.config = _config(shape)
        self._located = dict(_tensors(shape))
        self.names = frozenset(self._located)
        self._group_size = shape.group_size
        self._order = {name: index for index, name in enumerate(sorted(self.names))}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._located[name][0]

    def dtype(self, name: str) -> str:
        return self._located[name][1]

    def load(self, name: str) -> Tensor:
        shape, _ = self._located[name]
        generator = torch.Generator().manual_seed(self._order[name])
        if name.endswith(("qweight", "qzeros")):
            values = torch.randint(
                6 if name.endswith("qzeros") else 0,
                10 if name.endswith("qzeros") else 16,
                (shape[0], shape[1] * 8),
                generator=generator,
                dtype=torch.uint8,
            )
            return pack_int4(values)
        if name.endswith("scales"):
            # Weights of about 1 / sqrt(inputs): what the layers give stays of the size of what they take.
            size = 0.2 / (shape[0] * self._group_size) ** 0.5
            return (torch.rand(shape, generator=generator) * size + size / 2).half()
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(prod(shape), generator=generator) * 0.02).view(shape).to(torch.bfloat16)


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": shape.group_size,
            "version": "gemm",
            "zero_point": True,
        },
    }


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    hidden, width = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    yield "model.embed_tokens.weight", ((shape.vocab_size, hidden), "BF16")
    yield "lm_head.weight", ((shape.vocab_size, hidden), "BF16")
    yield "model.norm.weight", ((hidden,), "BF16")
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", ((hidden,), "BF16")
        for name, (inputs, outputs) in linears.items():
            groups = inputs // shape.group_size
            yield f"{prefix}.{name}.qweight", ((inputs, outputs // 8), "I32")
            yield f"{prefix}.{name}.qzeros", ((groups, outputs // 8), "I32")
            yield f"{prefix}.{name}.scales", ((groups, outputs), "F16")


class WeftEngine:
    """An engine in this process. `prefill` and `decode` return seconds."""

    def __init__(self, core: EngineCore, runner: Any, vocab_size: int) -> None:
        self.core = core
        self.runner = runner
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(0)
        self._number = 0

    def prefill(self, num_tokens: int) -> float:
        """Seconds from a new prompt of so many tokens to its first token."""
        begin = time.perf_counter()
        self._add(num_tokens, 1)
        while self.core.num_live:
            self.core.step()
        return time.perf_counter() - begin

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """Seconds of each of `steps` steps that give `batch` sequences one token each, at a context of
        `context` tokens and up.
        """
        for _ in range(batch):
            self._add(context, steps + 2)
        while self.core.num_live and not self._is_decoding(batch):
            self.core.step()
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.core.step()
            times.append(time.perf_counter() - begin)
        while self.core.num_live:
            self.core.step()
        return times

    def _is_decoding(self, batch: int) -> bool:
        live = self.core._live.values()
        return len(live) == batch and all(sequence.output_token_ids for sequence in live)

    def _add(self, num_tokens: int, max_tokens: int) -> None:
        self._number += 1
        ids = torch.randint(3, self._vocab_size, (num_tokens,), generator=self._generator).tolist()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.core.add(Sequence(key=self._number, prompt_token_ids=ids, params=params))


def make_engine(shape: Shape, num_threads: int, **settings: Any) -> WeftEngine:
    """Load random weights of a shape in bf16; `settings` go to RunnerConfig."""
    torch.set_num_threads(num_threads)
    checkpoint: Any = RandomCheckpoint(shape)
    config = load(["--source", "random", "--no-prefix-cache"])
    chosen = {"dtype": "bfloat16", "num_blocks": 64} | settings
    source = Source(checkpoint, "random", "", "sha256:random", "", None, is_artifact=False)
    runner = load_from(source, RunnerConfig(source=Path("random"), **chosen))
    return WeftEngine(make_core(config, runner, runner.info), runner, shape.vocab_size)
