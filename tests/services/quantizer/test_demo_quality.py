"""The demo model through the whole quantizer, on held-out text; as it is, and with outliers planted."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quant_outliers import plant_outliers
from services.quantizer.config import QuantizerConfig
from services.quantizer.job import run

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "models" / "demo"

pytestmark = pytest.mark.timeout(900)
BRIEF = {"samples": 8, "sequence_length": 128, "evaluation_tokens": 2048}


@pytest.fixture(
    scope="module", params=[BRIEF, pytest.param({}, marks=pytest.mark.slow)], ids=["brief", "full"]
)
def artifacts(request, tmp_path_factory):
    """(as it is, with outliers)"""
    root = tmp_path_factory.mktemp("quality")
    planted = plant_outliers(DEMO, root / "planted")
    torch.set_num_threads(1)
    return tuple(
        run(
            QuantizerConfig(
                source=source, artifacts=root / "artifacts", name=name, threads=1, **request.param
            )
        )
        for source, name in ((DEMO, "demo"), (planted, "planted"))
    )


def test_the_bounds_on_the_demo_model(artifacts):
    quality = artifacts[0].manifest.quality
    print(json.dumps(quality))
    assert quality["source"]["perplexity"] < 50
    assert quality["chosen"]["perplexity"] <= 1.025 * quality["source"]["perplexity"]
    # 8 windows of 128 tokens are few; all 128 of 512 gave 0.37.
    bound = 0.42 if quality["tokens"] > 30000 else 0.75
    assert quality["chosen"]["mean_kl"] <= bound * quality["rounding"]["mean_kl"]
    assert quality["chosen"]["greedy_agreement"] > quality["rounding"]["greedy_agreement"]


def test_no_linear_of_the_demo_model_is_worse_than_rounding(artifacts):
    for artifact in artifacts:
        assert len(artifact.manifest.linears) == 42
        for name, error in artifact.manifest.linears.items():
            assert error.chosen <= error.rounding, name


def test_outliers_hurt_rounding_and_hardly_awq(artifacts):
    plain, planted = (artifact.manifest.quality for artifact in artifacts)
    print(json.dumps(planted))
    assert planted["source"]["perplexity"] == pytest.approx(plain["source"]["perplexity"], rel=1e-4)
    assert planted["rounding"]["mean_kl"] > 1.5 * plain["rounding"]["mean_kl"]
    bound = 1.1 if planted["tokens"] > 30000 else 1.5
    assert planted["chosen"]["mean_kl"] <= bound * plain["chosen"]["mean_kl"]


def test_the_scales_answer_to_the_outliers(artifacts):
    report = json.loads((artifacts[1].path / "report.json").read_text())
    chosen = [label for group, label in report["scales"].items() if "q_proj" in group or "gate_proj" in group]
    assert len(chosen) == 12
    assert "identity" not in chosen
