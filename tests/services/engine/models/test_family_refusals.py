"""What InternLM, Phi-3 and Gemma checkpoints may hold that is not served, each named in the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.models.fields import ConfigError
from services.engine.models.loader import read_model_config
from services.engine.models.registry import ARCHITECTURES
from services.engine.runner.config import RunnerConfig
from services.engine.runner.model_runner import load_runner
from tests.services.engine.models.checkpoints import (
    GEMMA2,
    GEMMA3,
    INTERNLM2,
    INTERNLM3,
    LLAMA,
    PHI3,
    tensors_of,
    write_checkpoint,
)
from weft.artifact.checkpoint import Checkpoint, CheckpointError


def _load(directory: Path, **settings: Any) -> None:
    load_runner(RunnerConfig(source=directory, dtype="float32", block_size=16, num_blocks=40, **settings))


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        (LLAMA, {"rope_scaling": LONGROPE}, "rope_type 'longrope'"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (INTERNLM2, {"rope_scaling": {"type": "dynamic", "factor": 0}}, "rope_scaling: factor"),
        (INTERNLM2, {"bias": 1}, "bias"),
        (INTERNLM3, {"qkv_bias": "no"}, "qkv_bias"),
        (INTERNLM3, {"hidden_act": "gelu"}, "hidden_act"),
        (PHI3, {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}}, "short_factor"),
        (PHI3, {"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 7 + [0.0]}}, "long_factor"),
        (PHI3, {"rope_scaling": {"type": "longrope"}}, "short_factor"),
        (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        (PHI3, {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (PHI3, {"partial_rotary_factor": 0.19}, "partial_rotary_factor"),
        (PHI3, {"original_max_position_embeddings": 1, "rope_scaling": LONGROPE}, "original_max_position"),
        (PHI3, {"attention_bias": True}, "attention_bias"),
        (PHI3, {"lm_head_bias": True}, "lm_head_bias"),
        (PHI3, {"sliding_window": 0}, "sliding_window"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (GEMMA2, {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        (GEMMA2, {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
        (GEMMA2, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2, {"num_key_value_heads": None}, "num_key_value_heads"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        (GEMMA3, {"rope_local_base_freq": -1}, "rope_local_base_freq"),
        (GEMMA3, {"rope_parameters": {"full_attention": {}}}, "sliding_attention"),
        (GEMMA3, {"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'"),
        (GEMMA3, {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        (PHI3, {"architectures": ["PhiMoEForCausalLM"], "auto_map": None}, "PhiMoEForCausalLM"),
        (PHI3, {"architectures": ["Phi3SmallForCausalLM"], "auto_map": None}, "Phi3SmallForCausalLM"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = {key: value for key, value in {**base, **change}.items() if value is not None}
    directory = write_checkpoint(tmp_path / "model", config, tensors_of(base))
    with pytest.raises(ConfigError, match=named):
        _load(directory)


def test_code_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    config = {**INTERNLM2, "architectures": ["InternLM9ForCausalLM"]}
    directory = write_checkpoint(tmp_path / "model", config, tensors_of(INTERNLM2))
    with pytest.raises(CheckpointError, match="auto_map"):
        _load(directory)


def test_one_interleaved_tensor_is_checked_whole(tmp_path: Path) -> None:
    tensors = tensors_of(INTERNLM2)
    tensors["model.layers.1.attention.wqkv.weight"] = torch.zeros(96, 96)
    directory = write_checkpoint(tmp_path / "model", INTERNLM2, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.wqkv.* expected \[160, 96\]"):
        _load(directory)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_has_three_names_for_one_scaling(name: str, tmp_path: Path) -> None:
    config = {**PHI3, "rope_scaling": {**LONGROPE, "type": name}, "original_max_position_embeddings": 128}
    rope = read_model_config(Checkpoint.open(write_checkpoint(tmp_path, config), ARCHITECTURES)).rope
    assert rope.kind == "longrope"
    assert rope.attention_factor == pytest.approx((1 + 2 / 7) ** 0.5)  # 512 / 128 = 2^2, 128 = 2^7


@pytest.mark.parametrize(("length", "is_long"), [(128, False), (129, True)])
def test_long_factors_are_taken_above_the_original_length_and_said(
    length: int, is_long: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**PHI3, "rope_scaling": LONGROPE, "original_max_position_embeddings": 128}
    _load(write_checkpoint(tmp_path, config), max_model_len=length)
    assert ("long factors" in caplog.text) == is_long
