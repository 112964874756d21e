"""fp32 logits of random tiny models against `transformers`: whole prompts, and token by token through paged
blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.runner.config import RunnerConfig
from services.engine.runner.model_runner import ModelRunner, load_runner
from tests.services.engine.models.checkpoints import (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    dequantize_checkpoint,
    quantize_checkpoint,
    write_checkpoint,
)
from weft.memory import ModelShape, weight_bytes

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "llama without grouping": {**LLAMA, "num_key_value_heads": 4},
    "llama one kv head, odd sizes": {
        **LLAMA,
        "hidden_size": 60,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 18,
        "intermediate_size": 77,
        "vocab_size": 51,
        "num_hidden_layers": 3,
    },
    "llama biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama linear rope": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama llama3 rope": {**LLAMA, "rope_scaling": LLAMA3_ROPE},
    "llama nested rope": {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama with a window, which it does not have": {**LLAMA, "sliding_window": 20},
    "mistral": MISTRAL,
    "mistral window 1": {**MISTRAL, "sliding_window": 1},
    "mistral window 37": {**MISTRAL, "sliding_window": 37},
    "mistral window 129, odd heads": {**MISTRAL, "sliding_window": 129, "head_dim": 10},
    "qwen2": QWEN2,
    "qwen2 window in layer 1": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 50,
        "max_window_layers": 1,
    },
    "qwen3": QWEN3,
    "qwen3 window, biases": {
        **QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 33,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2 tied": {**QWEN2, "tie_word_embeddings": True, "num_key_value_heads": 1},
}


def _transformers_logits(directory: Path, ids: list[int]) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids])).logits[0]


def _load(directory: Path, block_size: int, **settings: Any) -> ModelRunner:
    num_blocks = 320 // block_size + 40
    config = RunnerConfig(
        source=directory,
        dtype="float32",
        block_size=block_size,
        num_blocks=num_blocks,
        is_poisoned=True,
        **settings,
    )
    return load_runner(config)


def _sequence(ids: list[int], blocks: list[int]) -> Sequence:
    sequence = Sequence(key="t", prompt_token_ids=ids, params=SamplingParams(max_tokens=1, temperature=0.0))
    sequence.block_table = blocks
    return sequence


def _by_token(runner: ModelRunner, ids: list[int], first: int) -> Tensor:
    """Logits of positions first - 1 and on: a prefill of `first` tokens in two chunks, then single tokens."""
    count = -(-len(ids) // runner.info.block_size)
    sequence = _sequence(ids, list(range(runner.info.num_blocks))[::-3][:count])
    runner.forward([Chunk(sequence, 0, first // 2, False)])
    rows = [runner.forward([Chunk(sequence, first // 2, first - first // 2, True)])]
    rows += [runner.forward([Chunk(sequence, position, 1, True)]) for position in range(first, len(ids))]
    return torch.cat(rows)


def _assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", VARIANTS[name])
    ids = torch.randint(
        VARIANTS[name]["vocab_size"], (150,), generator=torch.Generator().manual_seed(5)
    ).tolist()
    expected = _transformers_logits(directory, ids)
    runner = _load(directory, 16)
    count = -(-len(ids) // 16)
    for stop in (1, 2, 33, 150):
        last = runner.forward([Chunk(_sequence(ids[:stop], list(range(3, 3 + count))), 0, stop, True)])
        _assert_close(last[0], expected[stop - 1])
    _assert_close(_by_token(runner, ids, 120), expected[119:])
    assert runner.info.is_deterministic


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2, QWEN3], ids=lambda config: config["model_type"])
def test_weights_take_what_the_plan_says(config: dict[str, Any], tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", config)
    planned = weight_bytes(ModelShape.from_file(directory), 32)
    assert _load(directory, 16).info.weight_bytes == planned


@pytest.mark.parametrize("skip", [(), ("v_proj",), ("mlp",)])
@pytest.mark.parametrize("base", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_an_autoawq_checkpoint_is_what_its_nibbles_say(
    base: dict[str, Any], skip: tuple[str, ...], tmp_path: Path
) -> None:
    plain = write_checkpoint(tmp_path / "plain", base)
    packed = quantize_checkpoint(plain, tmp_path / "packed", 32, skip)
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(6)).tolist()
    expected = _transformers_logits(dequantize_checkpoint(packed, tmp_path / "meant"), ids)
    runner = _load(packed, 32)
    _assert_close(_by_token(runner, ids, 20), expected[19:])
    assert ("int4-dequantize" in runner.info.kernel_paths["down"]) == ("mlp" not in skip)


def test_stored_half_precision_is_served_in_float32(tmp_path: Path) -> None:
    from tests.services.engine.models.checkpoints import tensors_of

    halves = {name: tensor.half() for name, tensor in tensors_of(LLAMA).items()}
    directory = write_checkpoint(tmp_path / "model", {**LLAMA, "torch_dtype": "float16"}, halves)
    ids = [3, 14, 15, 9, 26]
    _assert_close(_by_token(_load(directory, 16), ids, 2), _transformers_logits(directory, ids)[1:])
