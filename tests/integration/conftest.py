"""A real 4-bit model for tests that need one: the demo model, rounded to the AutoAWQ layout."""

from __future__ import annotations

import json
import shutil

import pytest


def _round_to_int4(weight, group_size=128):
    """Plain asymmetric rounding of a [out, in] weight: ints [in, out], zeros and scales [in/group, out]."""
    import torch

    grouped = weight.float().t().reshape(-1, group_size, weight.shape[0])
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=2**-14).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    values = (grouped / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    return values.reshape(weight.shape[1], -1).to(torch.int32), zeros.to(torch.int32), scales


@pytest.fixture(scope="session")
def rounded_demo(demo_model, tmp_path_factory):
    """The demo model as an AutoAWQ gemm checkpoint: what people already have on disk."""
    safetensors = pytest.importorskip("safetensors.torch")
    from weft.artifact.packing import pack_int4

    target = tmp_path_factory.mktemp("awq") / "demo"
    shutil.copytree(demo_model, target)
    tensors = {}
    for name, tensor in safetensors.load_file(demo_model / "model.safetensors").items():
        if name.endswith("proj.weight"):
            values, zeros, scales = _round_to_int4(tensor)
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.qweight"] = pack_int4(values).contiguous()
            tensors[f"{stem}.qzeros"] = pack_int4(zeros).contiguous()
            tensors[f"{stem}.scales"] = scales.contiguous()
        else:
            tensors[name] = tensor
    safetensors.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    (target / "config.json").write_text(json.dumps(config))
    return target
