"""Quantized checkpoints as other tools write them, made with numpy alone from the formats' descriptions."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.quantizer.grid import QuantizedWeight, round_to_nearest

GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def words(numbers, axis, order=range(8)):
    """Eight numbers along `axis` to an int32."""
    eights = np.moveaxis(np.asarray(numbers), axis, -1).astype(np.uint32)
    eights = eights.reshape(*eights.shape[:-1], -1, 8)
    packed = np.zeros(eights.shape[:-1], np.uint32)
    for position, channel in enumerate(order):
        packed |= eights[..., channel] << np.uint32(4 * position)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32))


def numbers(packed, axis, order=range(8)):
    """The inverse of `words`."""
    packed = np.moveaxis(packed.numpy().view(np.uint32), axis, -1)
    out = np.empty((*packed.shape, 8), np.uint8)
    for position, channel in enumerate(order):
        out[..., channel] = (packed >> np.uint32(4 * position)) & 15
    return np.moveaxis(out.reshape(*packed.shape[:-1], -1), -1, axis)


def as_gemm(w):
    return {
        "qweight": words(w.values.T, 1, GEMM_ORDER),
        "qzeros": words(w.zeros.T, 1, GEMM_ORDER),
        "scales": w.scales.T.contiguous(),
    }


def as_gemv(w):
    groups = w.zeros.shape[1]
    width = 4 * -(-groups // 32)  # in words, as for a group size of 32
    zeros, scales = torch.zeros(len(w.zeros), 8 * width).int(), torch.zeros(len(w.zeros), 8 * width).half()
    zeros[:, :groups], scales[:, :groups] = w.zeros, w.scales
    return {"qweight": words(w.values, 1), "qzeros": words(zeros, 1), "scales": scales}


def as_gptq(w, offset=1, index=True):
    size = w.values.shape[1] // w.zeros.shape[1]
    tensors = {
        "qweight": words(w.values.T, 0),
        "qzeros": words((w.zeros.T.int() - offset) & 15, 1),
        "scales": w.scales.T.contiguous(),
    }
    if index:
        tensors["g_idx"] = (torch.arange(w.values.shape[1]) // size).int()
    return tensors


def as_pack_quantized(w, symmetric=False):
    tensors = {
        "weight_packed": words(w.values, 1),
        "weight_scale": w.scales.clone(),
        "weight_shape": torch.tensor(w.values.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(w.zeros, 0)
    return tensors


def pack_quantized_config(symmetric, group_size):
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "actorder": "static",
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def gptq_config(group_size, **more):
    return {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, **more}


FORMATS = {
    "gemm": (as_gemm, lambda g: {"quant_method": "awq", "bits": 4, "group_size": g, "zero_point": True,
                                 "version": "gemm"}),
    "gemv": (as_gemv, lambda g: {"quant_method": "awq", "w_bit": 4, "q_group_size": g, "version": "GEMV"}),
    "gptq": (as_gptq, gptq_config),
    "gptq_v2": (lambda w: as_gptq(w, 0), lambda g: gptq_config(g, checkpoint_format="gptq_v2")),
    "pack-quantized": (as_pack_quantized, lambda g: pack_quantized_config(False, g)),
    "pack-quantized symmetric": (
        lambda w: as_pack_quantized(w, True), lambda g: pack_quantized_config(True, g),
    ),
}  # fmt: skip


def symmetric(weight, group_size):
    """Rounding to a grid whose zero point is 8 throughout."""
    grouped = weight.unflatten(1, (-1, group_size))
    scales = (grouped.abs().amax(-1) / 7).clamp(min=2**-14).half()
    values = (torch.round(grouped / scales.float().unsqueeze(-1)) + 8).clamp(0, 15)
    return QuantizedWeight(values.flatten(1).byte(), torch.full(scales.shape, 8).byte(), scales)


@pytest.fixture
def make_quantized(make_checkpoint):
    """make_quantized("gptq", group_size, ...) -> (directory, {linear: QuantizedWeight}). `change`
    may alter the weights by linear, and the stored tensors by name, before they are written.
    """

    def make(
        name,
        group_size=32,
        change=None,
        change_tensors=None,
        change_config=None,
        skip=(),
        grid=None,
        family="Llama",
        **config,
    ):
        directory = make_checkpoint(family, **config)
        pack, describe = FORMATS[name]
        tensors = load_file(directory / "model.safetensors")
        weights = {}
        for full in [n.removesuffix(".weight") for n in tensors if n.endswith(LINEARS_WEIGHTS)]:
            if full.endswith(tuple(skip)) and skip:
                continue
            dense = tensors.pop(f"{full}.weight").float()
            size = group_size or dense.shape[1]
            rounded = symmetric(dense, size) if "symmetric" in name else round_to_nearest(dense, size)
            if name == "gptq":  # which has no way to write the zero point 0
                rounded = QuantizedWeight(rounded.values, rounded.zeros.clamp(min=1), rounded.scales)
            weights[full] = rounded
        if change is not None:
            change(weights)
        for full, weight in weights.items():
            tensors.update({f"{full}.{suffix}": tensor for suffix, tensor in pack(weight).items()})
        if change_tensors is not None:
            change_tensors(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
        document = json.loads((directory / "config.json").read_text())
        document["quantization_config"] = describe(group_size)
        if change_config is not None:
            change_config(document)
        (directory / "config.json").write_text(json.dumps(document))
        return directory, weights

    return make


LINEARS_WEIGHTS = tuple(f"{name}.weight" for name in LINEARS)


@pytest.fixture
def read_artifact():
    """read_artifact(path) -> ({linear: QuantizedWeight}, other tensors) of the gemm layout."""

    def read(path):
        tensors = {}
        for shard in path.glob("*.safetensors"):
            tensors.update(load_file(shard))
        weights = {}
        for full in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
            values, zeros = (
                torch.from_numpy(numbers(tensors.pop(f"{full}.{s}"), 1, GEMM_ORDER).T.copy())
                for s in ("qweight", "qzeros")
            )
            weights[full] = QuantizedWeight(values, zeros, tensors.pop(f"{full}.scales").T)
        return weights, tensors

    return read
