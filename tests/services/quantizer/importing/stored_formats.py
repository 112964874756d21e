"""Quantized checkpoints as other tools write them, made with numpy alone from the formats' descriptions."""

import numpy as np
import torch

from services.quantizer.grid import QuantizedWeight

GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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


def is_linear(name, tensor):
    """Whether a tensor of a plain checkpoint is a linear of a block."""
    return ".layers." in name and name.endswith(".weight") and tensor.ndim == 2
