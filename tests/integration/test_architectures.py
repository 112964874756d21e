"""What the quantizer makes of every architecture, the engine serves: two implementations, one canary."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from services.engine.runner import model_runner  # noqa: E402
from services.engine.runner.canary import CanaryError  # noqa: E402
from services.engine.runner.config import RunnerConfig  # noqa: E402
from services.engine.runner.model_runner import load_runner  # noqa: E402
from services.quantizer.config import QuantizerConfig  # noqa: E402
from services.quantizer.job import run  # noqa: E402
from services.quantizer.model_map import ARCHITECTURES  # noqa: E402
from tests.services.quantizer.tiny_models import TINY, write_tiny  # noqa: E402

CHANGES = {
    # The engine chooses longrope's factors once, for the context that it serves, here the longer ones; the
    # canary's prompts are within the first.
    "Phi3": {"original_max_position_embeddings": 64},
}

WITH_WINDOWS = ("Mistral", "Qwen2", "Gemma2", "Gemma3")
"""Phi-3's, of 64, is longer than the prompts."""


@pytest.fixture(scope="module", params=TINY)
def served(request, tmp_path_factory):
    """(name, artifacts) after a run of seconds; windows are shorter than the canary's prompts."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    source = write_tiny(root / "source", name, torch.bfloat16, **CHANGES.get(name, {}))
    config = QuantizerConfig(
        source=source,
        artifacts=root / "artifacts",
        name="tiny",
        samples=2,
        sequence_length=48,
        evaluation_tokens=0,
        group_size=32,
        threads=1,
        method="awq",  # the quickest: what is searched is another test's affair
    )
    run(config)
    return name, root / "artifacts"


def load(artifacts, **settings):
    return load_runner(
        RunnerConfig(
            artifacts=artifacts, model="tiny", dtype="float32", num_blocks=8, block_size=16, **settings
        )
    )


def test_the_engine_agrees_with_the_canary(served):
    name, artifacts = served
    runner = load(artifacts, max_model_len=128)
    assert runner.model.config.architecture == f"{name}ForCausalLM"
    assert runner.model.config.architecture in ARCHITECTURES


@pytest.mark.parametrize("served", WITH_WINDOWS, indirect=True)
def test_the_canary_sees_the_windows(served, monkeypatch):
    _, artifacts = served
    read = model_runner.read_model_config

    def without_windows(checkpoint):
        config = read(checkpoint)
        return dataclasses.replace(config, layer_windows=(None,) * config.num_layers)

    monkeypatch.setattr(model_runner, "read_model_config", without_windows)
    with pytest.raises(CanaryError):
        load(artifacts, max_model_len=128)
