"""Whole-model decoding at the shape of an 8B Llama with random weights, through the engine's own core and
runner: tokens per second, and the share of the time that reading weights and cache once would take.

Two clocks. The engine's: the time from step to step while every sequence decodes, sampling and scheduling
included. The device's: a forward alone, by events. Steps with and without CUDA graphs, bf16 and 4-bit
weights, one sequence and 64, each with a context of 1,024 tokens and more as it grows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_adapter import Sequences, make_core, random_runner
from benchmarks.gpu_measure import Bench, Row, Timing, quantiles
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.models.llama import Llama

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}
CONTEXT, NUM_NEW = 1024, 96
DRY_CONTEXT, DRY_NUM_NEW = 20, 3
TARGETS = {(4, 1): 600.0, (4, 64): 9000.0}
"""Tokens per second by (weight bits, batch)."""
BF16_ROOFLINE_TARGET = 0.65


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to decode. `kv_dtype` "auto" stores K and V as the activations are."""

    weight_bits: int
    batch: int
    has_graphs: bool = True
    is_deterministic: bool = False
    kv_dtype: str = "auto"

    @property
    def name(self) -> str:
        """As in the report."""
        weights = "int4" if self.weight_bits == 4 else "bf16"
        parts = [f"8B shape {weights} batch={self.batch}"]
        parts += [f"cache {self.kv_dtype}"] if self.kv_dtype != "auto" else []
        parts += ["deterministic"] if self.is_deterministic else []
        parts += [] if self.has_graphs else ["no graphs"]
        return ", ".join(parts)


SETTINGS = (
    Setting(4, 1),
    Setting(4, 64),
    Setting(4, 1, has_graphs=False),
    Setting(4, 64, has_graphs=False),
    Setting(4, 64, kv_dtype="int8"),
    Setting(4, 64, kv_dtype="fp8"),
    Setting(4, 1, is_deterministic=True),
    Setting(4, 64, is_deterministic=True),
    Setting(16, 1),
    Setting(16, 64),
)
DRY_SETTINGS = (Setting(4, 2), Setting(4, 2, is_deterministic=True), Setting(16, 1, has_graphs=False))


def run(bench: Bench) -> None:
    """All settings; neighbours share a model where its linears are the same."""
    models: dict[tuple[int, bool], Llama] = {}
    for setting in DRY_SETTINGS if bench.is_dry else SETTINGS:
        kind = (setting.weight_bits, setting.is_deterministic)
        if kind not in models:
            models.clear()
        with bench.case(setting.name):
            runner = _runner(bench, setting, models.get(kind))
            models[kind] = runner.model
            _decode(bench, setting, runner)


def _runner(bench: Bench, setting: Setting, model: Llama | None) -> Any:
    tokens = (DRY_CONTEXT + DRY_NUM_NEW if bench.is_dry else CONTEXT + NUM_NEW) + 1
    return random_runner(
        bench,
        TINY if bench.is_dry else LLAMA_8B,
        weight_bits=setting.weight_bits,
        num_blocks=setting.batch * -(-tokens // 128) + 1,
        max_batch_size=setting.batch,
        max_model_len=512 if bench.is_dry else 8192,
        max_batched_tokens=64 if bench.is_dry else 8192,
        is_deterministic=setting.is_deterministic,
        has_graphs=setting.has_graphs,
        kv_dtype=setting.kv_dtype,
        model=model,
    )


def _decode(bench: Bench, setting: Setting, runner: Any) -> None:
    """Rows of one setting: tokens per second, the forward's device time, its share of the roofline."""
    step = _steps(bench, setting, runner)
    rate = step.rate(setting.batch)
    target = None if setting.is_deterministic else TARGETS.get((setting.weight_bits, setting.batch))
    is_plain = setting.has_graphs and setting.kv_dtype == "auto"
    bench.emit(
        Row(
            bench.name,
            f"{setting.name}, engine step to step",
            "tokens/s",
            rate.median,
            rate.p20,
            rate.p80,
            target=target if is_plain else None,
        )
    )
    forward = _forward(bench, setting, runner)
    num_bytes = _bytes_per_step(bench, setting, runner)
    share = num_bytes / forward.median / bench.copy_bandwidth
    is_bf16 = setting.weight_bits == 16 and setting.batch == 1
    ms = [1e3 * value for value in (forward.median, forward.p20, forward.p80)]
    floor = 1e3 * num_bytes / bench.copy_bandwidth
    case, unit = f"{setting.name}, forward alone", "ms"
    roofline = BF16_ROOFLINE_TARGET if is_bf16 else None
    bench.emit(Row(bench.name, case, unit, *ms, "bytes read once at copy speed", floor, share, roofline))


def _prompts(bench: Bench, batch: int, vocabulary: int) -> list[list[int]]:
    length = DRY_CONTEXT if bench.is_dry else CONTEXT
    return bench.randint(vocabulary - 10, batch, length).add_(5).cpu().tolist()


def _steps(bench: Bench, setting: Setting, runner: Any) -> Timing:
    """Seconds between the ends of steps in which every sequence decodes, by the host's clock."""
    num_new = DRY_NUM_NEW if bench.is_dry else NUM_NEW
    core = make_core(runner, max_batch_size=setting.batch, max_batched_tokens=64 if bench.is_dry else 8192)
    for index, prompt in enumerate(_prompts(bench, setting.batch, runner.info.vocab_size)):
        params = SamplingParams(max_tokens=num_new, temperature=0.8, seed=index, ignore_eos=True)
        core.add(Sequence(index, prompt, params))
    gaps, last = [], None
    while core.num_live:
        report = core.step()
        now = time.perf_counter()
        is_whole = len(report.tokens) == setting.batch
        if is_whole and last is not None:
            gaps.append(now - last)
        last = now if is_whole else None
        if failures := [event.error for event in report.finished if event.error is not None]:
            raise RuntimeError(f"a sequence failed: {failures[0]}")
    # The first steps capture a graph or compile what warm-up did not.
    return quantiles(gaps[len(gaps) // 4 :])


def _forward(bench: Bench, setting: Setting, runner: Any) -> Timing:
    """Device seconds of one forward of decodes at the starting context."""
    sequences = Sequences(runner, _prompts(bench, setting.batch, runner.info.vocab_size), 1)
    sequences.prefill()
    sequences.append([7] * setting.batch)
    chunks = sequences.decode_chunks()
    if bench.is_dry:
        return bench.time([lambda: runner.forward(chunks)])
    return bench.time_replays(lambda: runner.forward(chunks))


def _bytes_per_step(bench: Bench, setting: Setting, runner: Any) -> int:
    """Weights but the embedding, of which a step reads a few rows, and K and V of the contexts."""
    model, info = runner.model, runner.info
    context = DRY_CONTEXT if bench.is_dry else CONTEXT
    weights = sum(linear.num_bytes for linear in model.linears.values())
    return weights + setting.batch * context * info.kv_bytes_per_token
