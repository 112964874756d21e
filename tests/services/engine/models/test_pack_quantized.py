"""compressed-tensors' pack-quantized checkpoints: what is served is what the numbers say; the rest is refused
by name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.engine.models.config import ConfigError
from services.engine.runner.config import RunnerConfig
from services.engine.runner.model_runner import ModelRunner, load_runner
from tests.services.engine.models.checkpoints import LLAMA, write_checkpoint
from tests.services.engine.models.test_against_transformers import _assert_close, _by_token
from weft.artifact.checkpoint import CheckpointError

IDS = torch.randint(97, (40,), generator=torch.Generator().manual_seed(6)).tolist()
Q = "model.layers.0.self_attn.q_proj"


def words(values: Tensor, dim: int) -> Tensor:
    """Eight signed numbers to an int32, the first in the lowest bits."""
    eights = (values.long() + 8).unflatten(dim, (-1, 8))
    packed = sum(part << (4 * i) for i, part in enumerate(eights.unbind(dim + 1)))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def config_of(symmetric: bool, group: int | None) -> dict[str, Any]:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "group_size": group,
        "strategy": "channel" if group is None else "group", "actorder": "static", "dynamic": False,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def write(
    directory: Path, symmetric: bool = False, group: int | None = 32, dtype: torch.dtype = torch.float16
) -> tuple[Path, Path]:
    """(packed, meant): a checkpoint with random signed numbers, and the plain one that it means."""
    plain = write_checkpoint(directory / "plain", LLAMA)
    generator = torch.Generator().manual_seed(1)
    packed, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        packed[name] = meant[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        size = group or tensor.shape[1]
        shape = (tensor.shape[0], tensor.shape[1] // size)
        values = torch.randint(-8, 8, tensor.shape, generator=generator)
        zeros = torch.zeros(shape).long() if symmetric else torch.randint(-8, 8, shape, generator=generator)
        scales = (torch.rand(shape, generator=generator) * 0.01 + 0.005).to(dtype)
        del packed[name]
        stem = name.removesuffix("weight")
        packed |= {
            f"{stem}weight_packed": words(values, 1),
            f"{stem}weight_scale": scales,
            f"{stem}weight_shape": torch.tensor(tensor.shape),
        }
        if not symmetric:
            packed[f"{stem}weight_zero_point"] = words(zeros, 0)
        spread = [t.repeat_interleave(size, 1) for t in (zeros, scales.float())]
        meant[name] = (values - spread[0]) * spread[1]
    config = {**LLAMA, "quantization_config": config_of(symmetric, group)}
    write_checkpoint(directory / "meant", LLAMA, meant)
    return write_checkpoint(directory / "packed", config, packed), directory / "meant"


def load(directory: Path) -> ModelRunner:
    return load_runner(RunnerConfig(source=directory, dtype="float32", block_size=16, num_blocks=40))


@pytest.mark.parametrize(
    ("symmetric", "group", "dtype"),
    [
        (False, 32, torch.float16),
        (True, 32, torch.float16),
        (False, None, torch.float16),
        (True, None, torch.bfloat16),
        (False, 16, torch.float32),
    ],
)
def test_what_is_served_is_what_the_numbers_say(
    tmp_path: Path, symmetric: bool, group: int | None, dtype: torch.dtype
) -> None:
    packed, meant = write(tmp_path, symmetric, group, dtype)
    runner = load(packed)
    assert "int4-dequantize" in runner.info.kernel_paths["down"]
    _assert_close(_by_token(runner, IDS, 20), _by_token(load(meant), IDS, 20))


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "8 bits": (lambda g: g["weights"].update(num_bits=8), "num_bits"),
    "floats": (lambda g: g["weights"].update(type="float"), "type"),
    "a scale per tensor": (lambda g: g["weights"].update(strategy="tensor"), "strategy"),
    "group size 0": (lambda g: g["weights"].update(group_size=0), "group_size"),
    "group size 48": (lambda g: g["weights"].update(group_size=48), "does not divide"),
    "symmetric a word": (lambda g: g["weights"].update(symmetric="no"), "symmetric"),
    "no weights": (lambda g: g.update(weights=None), "weights"),
    "activations": (lambda g: g.update(input_activations={"num_bits": 8}), "input_activations"),
    "another format": (lambda g: g.update(format="int-quantized"), "format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_schemes_that_are_refused(tmp_path: Path, case: str) -> None:
    packed, _ = write(tmp_path)
    change, named = REFUSED[case]
    config = json.loads((packed / "config.json").read_text())
    change(config["quantization_config"]["config_groups"]["group_0"])
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, CheckpointError), match=named):
        load(packed)


@pytest.mark.parametrize("value", [None, [], {}, "all"])
def test_no_groups_at_all(tmp_path: Path, value: Any) -> None:
    packed, _ = write(tmp_path)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["config_groups"] = value
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="config_groups"):
        load(packed)


def test_groups_that_differ(tmp_path: Path) -> None:
    packed, _ = write(tmp_path)
    config = json.loads((packed / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = copy.deepcopy(groups["group_0"])
    (packed / "config.json").write_text(json.dumps(config))
    load(packed)
    groups["group_1"]["weights"]["group_size"] = 16
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="config_groups differ"):
        load(packed)


TENSORS: dict[str, tuple[str, Callable[[Tensor | None], Tensor | None]]] = {
    "no zero points": ("weight_zero_point", lambda _: None),
    "zero points not packed": ("weight_zero_point", lambda _: torch.zeros(64, 2).to(torch.int8)),
    "no shape": ("weight_shape", lambda _: None),
    "another shape": ("weight_shape", lambda _: torch.tensor([64, 32])),
    "no scales": ("weight_scale", lambda _: None),
    "scales of another size": ("weight_scale", lambda t: None if t is None else t[:, :1].contiguous()),
    "a scale of zero": ("weight_scale", lambda t: None if t is None else t * 0),
    "a negative scale": ("weight_scale", lambda t: None if t is None else -t),
    "a scale that is not finite": ("weight_scale", lambda t: None if t is None else t / 0),
    "words of 64 bits": ("weight_packed", lambda t: None if t is None else t.long()),
    "act-order": ("weight_g_idx", lambda _: torch.zeros(64).int()),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(tmp_path: Path, case: str) -> None:
    packed, _ = write(tmp_path)
    suffix, change = TENSORS[case]
    tensors = load_file(packed / "model.safetensors")
    changed = change(tensors.pop(f"{Q}.{suffix}", None))
    if changed is not None:
        tensors[f"{Q}.{suffix}"] = changed
    write_checkpoint(packed, json.loads((packed / "config.json").read_text()), tensors)
    with pytest.raises(CheckpointError, match=f"{Q}.{suffix}"):
        load(packed)
