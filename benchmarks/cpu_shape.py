"""What the comparison on a CPU computes: the model's dimensions, the prompts, and the cases that are timed.

Standard library only: every system's process reads it, each with packages of its own. Knows no system.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What seconds are told by. "cpu" counts processor time of all threads: for a machine that others use."""


@dataclass(frozen=True)
class Dimensions:
    """Of a Llama with an output head of its own; the defaults are TinyLlama-1.1B's."""

    hidden_size: int = 2048
    num_layers: int = 22
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 5632
    vocab_size: int = 32000
    group_size: int = 128
    max_positions: int = 2048

    def config(self, *, is_quantized: bool) -> dict[str, Any]:
        """config.json, of the plain checkpoint or of the one in AutoAWQ's format."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }
        if is_quantized:
            config["torch_dtype"] = "float16"
            config["quantization_config"] = {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group_size,
                "version": "gemm",
                "zero_point": True,
            }
        return config

    def linears(self) -> dict[str, tuple[int, int]]:
        """{name within a layer: (outputs, inputs)}."""
        hidden, width = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
        }


@dataclass(frozen=True)
class Workload:
    """What is timed. `steps` maps a batch size to its timed decode steps; before them come `warm_steps` that
    are not timed. Each sequence starts with `context` tokens of its own in the cache.
    The reference knows `num_prompts` of them, at least as many as the largest batch.
    """

    context: int = 128
    prefill: int = 512
    steps: tuple[tuple[int, int], ...] = ((1, 24), (4, 16), (16, 12))
    warm_steps: int = 2
    num_prompts: int = 16

    @property
    def max_batch(self) -> int:
        return max(batch for batch, _ in self.steps)

    @property
    def cases(self) -> list[str]:
        """In the order in which they are timed."""
        return [*(f"decode {batch}" for batch, _ in self.steps), f"prefill {self.prefill}"]

    @property
    def tokens_each(self) -> int:
        """The most tokens that one decoding sequence comes to."""
        return self.context + 1 + self.warm_steps + max(steps for _, steps in self.steps)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """`num_prompts` of them: `context` tokens each, and the first token that decoding computes."""
        return [_tokens(f"context {i}", self.context + 1, vocab_size) for i in range(self.num_prompts)]

    def prefill_prompt(self, vocab_size: int, run: int) -> list[int]:
        """Another one for each run, so that no cache of prompts can serve it. Run 0 is for the check."""
        return _tokens(f"prefill {run}", self.prefill, vocab_size)


TINYLLAMA = Dimensions()
TINY = Dimensions(
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=512,
    vocab_size=512,
    max_positions=512,
)
WORKLOAD = Workload()
QUICK = Workload(context=128, prefill=160, steps=((1, 3), (4, 3)), warm_steps=1, num_prompts=4)


def folder_name(dimensions: Dimensions, workload: Workload) -> str:
    """Equal names: equal weights and prompts."""
    values = (*asdict(dimensions).values(), workload.context, workload.prefill, workload.num_prompts)
    return "-".join(str(value) for value in ("v2", *values))


def from_spec(spec: dict[str, Any]) -> tuple[Dimensions, Workload]:
    """Both, from what `to_spec` put into JSON."""
    workload = dict(spec["workload"])
    workload["steps"] = tuple(tuple(pair) for pair in workload["steps"])
    return Dimensions(**spec["dimensions"]), Workload(**workload)


def to_spec(dimensions: Dimensions, workload: Workload) -> dict[str, Any]:
    """For JSON."""
    return {"dimensions": asdict(dimensions), "workload": asdict(workload)}


def tensor_names(dimensions: Dimensions) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the plain checkpoint with its shape."""
    hidden = dimensions.hidden_size
    yield "model.embed_tokens.weight", (dimensions.vocab_size, hidden)
    yield "lm_head.weight", (dimensions.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(dimensions.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        for name, shape in dimensions.linears().items():
            yield f"{prefix}{name}.weight", shape


def _tokens(seed: str, count: int, vocab_size: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(3, vocab_size) for _ in range(count)]
