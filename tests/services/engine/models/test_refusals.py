"""Configurations and tensors that must not load, each named in the error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.engine.models.fields import ConfigError
from services.engine.models.loader import read_model_config
from services.engine.models.registry import ARCHITECTURES
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from services.engine.runner.model_runner import load_runner
from tests.services.engine.models.checkpoints import (
    GEMMA2,
    GEMMA3,
    LLAMA,
    MISTRAL,
    PHI3,
    QWEN3,
    quantize_checkpoint,
    tensors_of,
    write_checkpoint,
)
from weft.artifact.checkpoint import Checkpoint, CheckpointError

AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}


def _load(directory: Path, **settings: Any) -> None:
    load_runner(RunnerConfig(source=directory, dtype="float32", block_size=16, num_blocks=40, **settings))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": 7}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "default"}}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": 97}, "eos_token_id"),
        ({"eos_token_id": list(range(90))}, "eos_token_id"),
        ({"bos_token_id": 1000}, "bos_token_id"),
        ({"quantization_config": {**AWQ, "bits": 3}}, "bits"),
        ({"quantization_config": {**AWQ, "group_size": 0}}, "group_size"),
        ({"quantization_config": {**AWQ, "group_size": 7}}, "group_size"),
        ({"quantization_config": {**AWQ, "zero_point": False}}, "zero_point"),
        ({"quantization_config": {**AWQ, "version": "gemv"}}, "gemv"),
        ({"quantization_config": {**AWQ, "quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {**AWQ, "modules_to_not_convert": "lm_head"}}, "modules_to_not_convert"),
    ],
)
def test_a_bad_config_names_its_field(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    config = {key: value for key, value in {**LLAMA, **change}.items() if value is not None}
    directory = write_checkpoint(tmp_path / "model", config, tensors_of(LLAMA))
    with pytest.raises(ConfigError, match=named):
        _load(directory)


WINDOWED = {**QWEN3, "use_sliding_window": True, "sliding_window": 9}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LLAMA, (None, None)),
        ({**MISTRAL, "sliding_window": 7}, (7, 7)),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, (4096, 4096)),
        (WINDOWED, (None, None)),
        ({**WINDOWED, "max_window_layers": 1}, (None, 9)),
        ({**WINDOWED, "max_window_layers": 0, "use_sliding_window": False}, (None, None)),
        ({**WINDOWED, "layer_types": ["sliding_attention", "full_attention"]}, (9, None)),
        (PHI3, (37, 37)),
        ({**PHI3, "sliding_window": None}, (None, None)),
        ({key: value for key, value in PHI3.items() if key != "sliding_window"}, (None, None)),
        (GEMMA2, (37, None, 37)),
        ({key: value for key, value in GEMMA2.items() if key != "sliding_window"}, (4096, None, 4096)),
        (GEMMA3, (37, 37, None, 37)),
        ({**GEMMA3, "layer_types": ["full_attention", *["sliding_attention"] * 3]}, (None, 37, 37, 37)),
    ],
)
def test_windows_are_read_as_transformers_reads_them(
    config: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    raw = Checkpoint.open(write_checkpoint(tmp_path / "model", config), ARCHITECTURES)
    assert read_model_config(raw).layer_windows == windows


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 0},
        {"sliding_window": "9"},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": False},
        {"max_window_layers": -1},
        {**MISTRAL, "layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_a_bad_window_names_its_field(change: dict[str, Any], tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", {**WINDOWED, **change}, tensors_of(WINDOWED))
    with pytest.raises(ConfigError, match=r"window|layer_types"):
        _load(directory)


@pytest.mark.parametrize(
    ("name", "replacement", "text"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "is missing"),
        ("model.norm.weight", None, "is missing"),
        ("lm_head.weight", None, "is missing"),
        ("model.embed_tokens.weight", torch.zeros(96, 64), r"\[96, 64\], expected \[97, 64\]"),
        ("model.layers.0.self_attn.k_proj.weight", torch.zeros(64, 64), r"expected \[32, 64\]"),
        ("model.layers.0.self_attn.q_proj.weight", torch.zeros(64, 64, dtype=torch.int32), "dtype I32"),
        ("model.layers.0.input_layernorm.weight", torch.full((64,), float("nan")), "not finite"),
        ("model.layers.2.mlp.up_proj.weight", torch.zeros(96, 64), "does not have"),
    ],
)
def test_a_bad_tensor_is_named(
    name: str, replacement: torch.Tensor | None, text: str, tmp_path: Path
) -> None:
    tensors = tensors_of(LLAMA)
    tensors.pop(name, None)
    if replacement is not None:
        tensors[name] = replacement
    directory = write_checkpoint(tmp_path / "model", LLAMA, tensors)
    with pytest.raises(CheckpointError, match=text) as caught:
        _load(directory)
    assert name in str(caught.value)


def test_a_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = tensors_of(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    _load(write_checkpoint(tmp_path / "same", config, tensors))
    tensors["lm_head.weight"][3, 3] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        _load(write_checkpoint(tmp_path / "other", config, tensors))


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("inf"), "not finite"), (float("nan"), "not finite"), (0.0, "above zero"), (-0.1, "above")],
)
def test_a_bad_scale_is_named(value: float, text: str, tmp_path: Path) -> None:
    packed = quantize_checkpoint(write_checkpoint(tmp_path / "plain", LLAMA), tmp_path / "packed", 32)
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.scales"
    tensors[name][1, 5] = value
    write_checkpoint(packed, json.loads((packed / "config.json").read_text()), tensors)
    with pytest.raises(CheckpointError, match=text) as caught:
        _load(packed)
    assert name in str(caught.value)


def test_a_group_that_does_not_divide_is_named(tmp_path: Path) -> None:
    packed = quantize_checkpoint(write_checkpoint(tmp_path / "plain", LLAMA), tmp_path / "packed", 32)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["group_size"] = 48
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight .* groups of 48"):
        _load(packed)


def test_quantized_tensors_need_a_quantization_config(tmp_path: Path) -> None:
    packed = quantize_checkpoint(write_checkpoint(tmp_path / "plain", LLAMA), tmp_path / "packed", 32)
    (packed / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(CheckpointError, match="quantization_config"):
        _load(packed)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "bfloat16", "is_deterministic": True, "has_native_kernels": False}, "float32"),
        ({"dtype": "int8"}, "dtype"),
        ({"block_size": 100}, "block_size"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"num_blocks": None, "kv_memory_bytes": 100}, "kv_memory_bytes"),
        ({"artifacts": Path("/nowhere")}, "either"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", LLAMA)
    base = {"source": directory, "dtype": "float32", "block_size": 16, "num_blocks": 40}
    with pytest.raises(RunnerConfigError, match=named):
        load_runner(RunnerConfig(**{**base, **settings}))


@pytest.mark.parametrize("length", [0, 513])
def test_a_context_the_model_does_not_have_is_refused(length: int, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", copy.deepcopy(LLAMA))
    with pytest.raises((ConfigError, RunnerConfigError), match=r"max.model.len"):
        _load(directory, max_model_len=length)
