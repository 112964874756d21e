"""A checkpoint with planted outlier channels that computes the same function as the one it is made from.

Small models have no outlier channels, so activation-aware scaling has nothing to do on them. Here 1% of the
channels of each block's norms are multiplied, and the columns that read them divided, which changes nothing
but where the numbers are large. Knows Llama's names only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FACTOR = 100.0
SHARE = 0.01
_CONSUMERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant_outliers(source: Path, target: Path) -> Path:
    """Write a copy of `source` (one safetensors file) with outliers to `target`, in fp32; returns it."""
    shutil.copytree(source, target)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for layer in range(config["num_hidden_layers"]):
        for norm, consumers in _CONSUMERS.items():
            weight = tensors[f"model.layers.{layer}.{norm}.weight"]
            count = max(1, round(weight.numel() * SHARE))
            channels = torch.randperm(weight.numel(), generator=generator)[:count]
            weight[channels] *= FACTOR
            for consumer in consumers:
                tensors[f"model.layers.{layer}.{consumer}.weight"][:, channels] /= FACTOR
    (target / "model.safetensors").chmod(0o644)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
