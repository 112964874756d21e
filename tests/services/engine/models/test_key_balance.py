"""Key channels that stick out: evened out at load without a changed bit, and integer codes lose less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels.kv_format import FORMATS
from services.engine.kernels.numerics import Numerics
from services.engine.models.key_balance import key_divisors
from services.engine.models.loader import load_model, read_model_config
from services.engine.models.registry import ARCHITECTURES
from services.engine.runner.config import RunnerConfig
from services.engine.runner.inputs import make_inputs
from services.engine.runner.kv_cache import KVCache
from services.engine.runner.model_runner import load_runner
from tests.services.engine.models.checkpoints import (
    GEMMA2,
    GEMMA3,
    INTERNLM2,
    INTERNLM3,
    LLAMA,
    PHI3,
    QWEN2,
    QWEN3,
    quantize_checkpoint,
    tensors_of,
    write_checkpoint,
)
from weft.artifact.checkpoint import Checkpoint

IDS = torch.randint(97, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def _with_outliers(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors, one rotary pair of kv head 1 (of both, where norms are shared) 40 times as large."""
    if config["model_type"] in ("internlm2", "phi3"):
        return _fused_with_outliers(config)
    tensors = tensors_of(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    for name, tensor in tensors.items():
        is_key, is_query = "k_proj" in name or "k_norm" in name, "q_proj" in name or "q_norm" in name
        if not (is_key or is_query):
            continue
        by_head = tensor.view(-1, head_dim, *tensor.shape[1:])
        if config["model_type"] in ("qwen3", "gemma3_text") and "proj" in name:
            continue
        offset = 1.0 if config["model_type"] == "gemma3_text" else 0.0
        tensor += offset
        group = heads // kv_heads if is_query else 1
        first = 0 if "norm" in name else group
        for channel in (2, 2 + head_dim // 2):
            by_head[first:, channel] *= 40.0 if is_key else 1 / 40.0
        tensor -= offset
    return tensors


def _fused_with_outliers(config: dict[str, Any]) -> dict[str, Tensor]:
    """The same in one tensor of queries, keys and values: channels 2 and 2 + rotary_dim / 2 of kv head 1."""
    tensors = tensors_of(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, group = config["hidden_size"] // heads, heads // kv_heads
    turned = int(head_dim * config.get("partial_rotary_factor", 1.0))
    is_interleaved = config["model_type"] == "internlm2"
    key = group + 2 + group if is_interleaved else heads + 1
    queries = range(group + 2, 2 * group + 2) if is_interleaved else range(group, 2 * group)
    for name, tensor in tensors.items():
        if "qkv" in name:
            by_head = tensor.view(-1, head_dim, *tensor.shape[1:])
            for channel in (2, 2 + turned // 2):
                by_head[key, channel] *= 40.0
                by_head[list(queries), channel] /= 40.0
    return tensors


def _logits(
    directory: Path, kv_dtype: str, *, balances_keys: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    checkpoint = Checkpoint.open(directory, ARCHITECTURES)
    config = read_model_config(checkpoint)
    numerics = Numerics(dtype, is_deterministic=dtype == torch.float32)
    model = load_model(checkpoint, config, numerics, 128, balances_keys=balances_keys)
    cache = KVCache(config, 5, 16, FORMATS[kv_dtype], is_poisoned=True)
    sequence = Sequence("s", IDS, SamplingParams(max_tokens=1), block_table=[3, 0, 4, 1])
    inputs = make_inputs([Chunk(sequence, 0, len(IDS), True)], 16, 5, 16)
    with torch.inference_mode():
        return model.forward(inputs.token_ids, inputs.metadata, cache.layers, torch.arange(len(IDS)))


CONFIGS = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "internlm2": {**INTERNLM2, "bias": True},
    "internlm3": INTERNLM3,
    "phi3": {**PHI3, "partial_rotary_factor": 0.75},
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}


@pytest.fixture(params=[*CONFIGS, "llama packed", "internlm2 packed", "phi3 packed"])
def outliers(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = CONFIGS[request.param.split(" ")[0]]
    directory = write_checkpoint(tmp_path / "plain", config, _with_outliers(config))
    if "packed" not in request.param:
        return directory
    return quantize_checkpoint(directory, tmp_path / "packed", 32, ("mlp", "feed_forward"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_changes_in_full_precision(outliers: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    as_it_is, balanced = (
        _logits(outliers, name, balances_keys=balances, dtype=dtype) for balances in (False, True)
    )
    assert torch.equal(as_it_is, balanced)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_integer_codes_lose_less(outliers: Path, kv_dtype: str) -> None:
    exact = _logits(outliers, "float32", balances_keys=False)
    errors = [
        float((_logits(outliers, kv_dtype, balances_keys=balances) - exact).square().mean())
        for balances in (False, True)
    ]
    assert errors[1] < errors[0] / 4


def test_a_runner_balances_for_integer_codes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "model", LLAMA)
    asked: list[bool] = []
    real = load_model

    def spy(*args: Any, balances_keys: bool, **settings: Any) -> Any:
        asked.append(balances_keys)
        return real(*args, balances_keys=balances_keys, **settings)

    monkeypatch.setattr("services.engine.runner.model_runner.load_model", spy)
    for kv_dtype in ("auto", "fp8", "int8", "int4"):
        load_runner(RunnerConfig(source=directory, kv_dtype=kv_dtype, num_blocks=4))
    assert asked == [False, False, True, True]


def test_divisors_are_powers_of_two_for_what_sticks_out() -> None:
    magnitude = torch.ones(3, 10)
    magnitude[0, 1], magnitude[0, 6] = 30.0, 20.0  # one pair, 25.5 together
    magnitude[1, 3] = 3.5  # with its partner 2.6: no finding
    magnitude[2, 4] = magnitude[2, 9] = 1e6
    divisors = key_divisors(magnitude)
    expected = torch.ones(3, 10)
    expected[0, [1, 6]], expected[2, [4, 9]] = 32.0, 64.0
    assert torch.equal(divisors, expected)


@pytest.mark.parametrize("head", [torch.zeros(1, 6), torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0, 5.0]])])
def test_a_head_without_a_usual_channel_is_left_alone(head: Tensor) -> None:
    assert torch.isfinite(key_divisors(head)).all()
    assert key_divisors(torch.zeros(1, 6)).tolist() == [[1.0] * 6]
