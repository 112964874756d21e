"""Checkpoints that are quantized already, of tiny random models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.quantizer.grid import QuantizedWeight, round_to_nearest
from tests.services.quantizer.importing.stored_formats import (
    FORMATS,
    GEMM_ORDER,
    is_linear,
    numbers,
    symmetric,
)


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
        for full in [n.removesuffix(".weight") for n, t in tensors.items() if is_linear(n, t)]:
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
