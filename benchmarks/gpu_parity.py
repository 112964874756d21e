"""Whole-model parity of the demo model on the device: against the CPU twin in fp32 and against transformers.

Teacher-forced: every runner sees the tokens that the twin chose, so one near tie does not end the comparison.
Checked are the logits' relative error, and that the likeliest token is the twin's wherever the twin's lead is
beyond the format's error. Deterministic: a row's logits alone and among others, bit for bit.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_adapter
from benchmarks.gpu_adapter import Sequences
from benchmarks.gpu_measure import Bench, Row, relative_error

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
VOCABULARIES = {False: 4096, True: 160}
LENGTHS, NUM_NEW = (1, 17, 63, 130, 300, 511), 24
DRY_LENGTHS, DRY_NUM_NEW = (3, 17), 1
MARGIN = 0.5
"""The likeliest token must be the twin's where the twin's logits lead by more than this."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Relative error of logits against a twin of the same cache format."""


@dataclass(slots=True)
class Trace:
    """A run's tokens after the prompts, [steps, sequences], and logits [steps, sequences, vocab] on the
    CPU.
    """

    tokens: list[list[int]]
    logits: Tensor


def run(bench: Bench) -> None:
    """Twin and transformers, cache formats, 4-bit weights, determinism."""
    prompts = _prompts(bench.is_dry)
    with tempfile.TemporaryDirectory() as folder:
        demo = _tiny(Path(folder)) if bench.is_dry else DEMO
        packed = _packed(demo, Path(folder))
        twins: dict[tuple[str, str], Trace] = {}
        for name, source in (("plain", demo), ("int4", packed)):
            for kv_dtype in _formats(bench, name):
                with bench.case(f"CPU twin, weights {name}, cache {kv_dtype}"):
                    runner = gpu_adapter.cpu_runner(source, **_settings(bench, kv_dtype, prompts))
                    twins[name, kv_dtype] = _trace(bench, runner, prompts)
        if ("plain", "auto") in twins:
            with bench.case("transformers, fp32"):
                _check_transformers(bench, demo, prompts, twins["plain", "auto"])
        with bench.case("device operations"), gpu_adapter.device_operations(bench):
            for (name, kv_dtype), twin in twins.items():
                source = demo if name == "plain" else packed
                for dtype in ("float32",) if bench.is_dry else ("bfloat16", "float16", "float32"):
                    case = f"device {dtype}, weights {name}, cache {kv_dtype}, against the CPU twin"
                    with bench.case(case):
                        _check(bench, case, source, dtype, kv_dtype, prompts, twin)
            for name, source in (("plain", demo), ("int4", packed)):
                with bench.case(f"deterministic, weights {name}: a row alone and among others"):
                    _check_deterministic(bench, name, source, prompts)


def _formats(bench: Bench, weights: str) -> tuple[str, ...]:
    """Cache formats to try with these weights."""
    if weights == "int4":
        return ("auto",)
    return ("auto", "int8") if bench.is_dry else ("auto", "int8", "fp8", "int4")


def _settings(bench: Bench, kv_dtype: str, prompts: list[list[int]]) -> dict[str, Any]:
    longest = max(map(len, prompts)) + (7 if bench.is_dry else 64)
    return {
        "kv_dtype": kv_dtype,
        "block_size": 16,
        "num_blocks": 4 * len(prompts) * -(-longest // 16),
        "max_batch_size": 2 if bench.is_dry else 16,
        "max_batched_tokens": 32 if bench.is_dry else 512,
        "max_model_len": 24 if bench.is_dry else None,
        "is_poisoned": True,
    }


def _prompts(is_dry: bool) -> list[list[int]]:
    lengths, vocabulary = DRY_LENGTHS if is_dry else LENGTHS, VOCABULARIES[is_dry]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def _tiny(folder: Path) -> Path:
    """What stands in for the demo model when dry: one layer of random weights."""
    from tests.services.engine.models.checkpoints import LLAMA, write_checkpoint

    sizes = {"vocab_size": VOCABULARIES[True], "hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_checkpoint(folder / "tiny", LLAMA | sizes | heads)


def _packed(source: Path, folder: Path) -> Path:
    """The checkpoint with its linears rounded to 4 bits."""
    from tests.services.engine.models.checkpoints import quantize_checkpoint

    return quantize_checkpoint(source, folder / "packed", 128)


def _trace(bench: Bench, runner: Any, prompts: list[list[int]], forced: Trace | None = None) -> Trace:
    """Prefill each prompt, then decode all together; greedy, or along another run's tokens."""
    num_new = DRY_NUM_NEW if bench.is_dry else NUM_NEW
    sequences = Sequences(runner, prompts, num_new)
    logits = [sequences.prefill(step=32 if bench.is_dry else 100).float().cpu()]
    tokens: list[list[int]] = []
    for step in range(num_new):
        tokens.append(forced.tokens[step] if forced else logits[-1].argmax(-1).tolist())
        sequences.append(tokens[-1])
        logits.append(sequences.decode().float().cpu())
    return Trace(tokens, torch.stack(logits))


def _disagreements(found: Tensor, expected: Tensor) -> tuple[int, int]:
    """(positions whose likeliest token differs although the expected lead is clear, positions that
    differ).
    """
    top = expected.topk(2, dim=-1).values
    differs = found.argmax(-1) != expected.argmax(-1)
    return int((differs & (top[..., 0] - top[..., 1] > MARGIN)).sum()), int(differs.sum())


def _report(bench: Bench, case: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = relative_error(found, expected)
    wrong, differing = _disagreements(found, expected)
    positions = expected.shape[:-1].numel()
    is_good = error <= tolerance and wrong == 0
    note = f"likeliest token: {differing} of {positions} differ, {wrong} of them with a clear lead"
    row = Row(bench.name, case, "relative error", error, target=tolerance, is_low_good=True, note=note)
    bench.emit(row if is_good else Row(bench.name, case, status="failed", note=f"error {error:.2e}; {note}"))


def _check(
    bench: Bench, case: str, source: Path, dtype: str, kv_dtype: str, prompts: list[list[int]], twin: Trace
) -> None:
    runner = gpu_adapter.device_runner(bench, source, dtype=dtype, **_settings(bench, kv_dtype, prompts))
    _report(bench, case, _trace(bench, runner, prompts, twin).logits, twin.logits, TOLERANCES[dtype])


def _check_transformers(bench: Bench, source: Path, prompts: list[list[int]], twin: Trace) -> None:
    """The twin's logits against those of transformers' own model, in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    rows = []
    for index, prompt in enumerate(prompts):
        ids = prompt + [tokens[index] for tokens in twin.tokens]
        rows.append(model(torch.tensor([ids])).logits[0, len(prompt) - 1 :])
    found = torch.stack(rows, 1)
    _report(bench, "CPU twin against transformers, fp32", twin.logits, found, 1e-4)


def _check_deterministic(bench: Bench, name: str, source: Path, prompts: list[list[int]]) -> None:
    """Every row's logits in the batch, and again alone, in bits."""
    dtype = "float32" if bench.is_dry else "bfloat16"
    settings = _settings(bench, "auto", prompts)
    runner = gpu_adapter.device_runner(bench, source, dtype=dtype, is_deterministic=True, **settings)
    together = Sequences(runner, prompts, 1)
    first = together.prefill()
    together.append(first.argmax(-1).tolist())
    rows = together.decode()
    wrong = 0
    for index, prompt in enumerate(prompts):
        alone = Sequences(runner, [prompt], 1)
        wrong += not torch.equal(alone.prefill(step=7 if len(prompt) < 100 else 64), first[index : index + 1])
        alone.append([int(first[index].argmax())])
        wrong += not torch.equal(alone.decode(), rows[index : index + 1])
    case = f"deterministic {dtype}, weights {name}: rows that differ alone and among others"
    status = "failed" if wrong else "ok"
    bench.emit(
        Row(
            bench.name, case, "rows", wrong, target=0, is_low_good=True, status=status, note=f"{wrong} differ"
        )
    )
