"""A checkpoint of every architecture, quantized by others, becomes an artifact whose canary the engine
confirms.
"""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from services.engine.runner.config import RunnerConfig  # noqa: E402
from services.engine.runner.model_runner import load_runner  # noqa: E402
from services.quantizer.config import QuantizerConfig  # noqa: E402
from services.quantizer.grid import QuantizedWeight, round_to_nearest  # noqa: E402
from services.quantizer.importing.config import ImportConfig  # noqa: E402
from services.quantizer.importing.job import run_import  # noqa: E402
from services.quantizer.job import run  # noqa: E402
from tests.services.quantizer.importing.stored_formats import FORMATS, is_linear  # noqa: E402
from tests.services.quantizer.tiny_models import TINY, write_tiny  # noqa: E402

CHANGES = {"Phi3": {"original_max_position_embeddings": 64}}
"""The engine chooses longrope's factors once, for the context that it serves."""


def pack(directory, name):
    """Every linear of the blocks rounded and stored as `name` says, zero points from 1 up."""
    store, describe = FORMATS[name]
    tensors = {}
    for full, tensor in safetensors.load_file(directory / "model.safetensors").items():
        if is_linear(full, tensor):
            weight = round_to_nearest(tensor.float(), 32)
            weight = QuantizedWeight(weight.values, weight.zeros.clamp(min=1), weight.scales)
            stem = full.removesuffix("weight")
            tensors |= {f"{stem}{suffix}": t.contiguous() for suffix, t in store(weight).items()}
        else:
            tensors[full] = tensor
    safetensors.save_file(tensors, directory / "model.safetensors")
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, "quantization_config": describe(32)}))


def load(artifacts):
    settings = {"dtype": "float32", "num_blocks": 8, "block_size": 16, "max_model_len": 128}
    return load_runner(RunnerConfig(artifacts=artifacts, model="tiny", **settings))


@pytest.mark.parametrize("name", TINY)
def test_the_engine_agrees_with_an_import(name, tmp_path):
    source = write_tiny(tmp_path / "source", name, torch.bfloat16, **CHANGES.get(name, {}))
    pack(source, "pack-quantized" if name in ("InternLM2", "Gemma3") else "gptq")
    artifact = run_import(ImportConfig(source=source, artifacts=tmp_path / "artifacts", name="tiny"))
    assert artifact.manifest.canary.prompts
    assert load(tmp_path / "artifacts").model.config.architecture == f"{name}ForCausalLM"


@pytest.mark.parametrize("name", ["InternLM2", "Phi3"])
def test_fused_linears_in_compressed_tensors(name, tmp_path):
    source = write_tiny(tmp_path / "source", name, torch.bfloat16, **CHANGES.get(name, {}))
    artifacts = tmp_path / "artifacts"
    run(
        QuantizerConfig(
            source=source, artifacts=artifacts, name="tiny", format="compressed-tensors", samples=2,
            sequence_length=48, evaluation_tokens=0, group_size=32, threads=1,
        )
    )  # fmt: skip
    # Loading replays the canary, and fails where the engine answers otherwise.
    assert load(artifacts).model.config.architecture == f"{name}ForCausalLM"
