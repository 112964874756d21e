"""The benchmark of quantizers: its reader and its figures, against what they are defined as."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quant import Cost, goals, table
from benchmarks.quant_evaluate import _summary, dense_artifact
from weft.artifact.packing import dequantize, pack_int4


def test_an_artifact_is_read_as_the_layout_defines_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (64, 24), generator=generator)
    zeros = torch.randint(0, 16, (2, 24), generator=generator)
    stored = {
        "a.qweight": pack_int4(values),
        "a.qzeros": pack_int4(zeros),
        "a.scales": torch.rand(2, 24, generator=generator).half(),
        "norm.weight": torch.rand(3, generator=generator).bfloat16(),
    }
    save_file(stored, tmp_path / "model-00001-of-00001.safetensors")
    dense = dense_artifact(tmp_path)
    assert set(dense) == {"a.weight", "norm.weight"}
    expected = dequantize(stored["a.qweight"], stored["a.qzeros"], stored["a.scales"])
    assert torch.equal(dense["a.weight"], expected.T)
    assert torch.equal(dense["norm.weight"], stored["norm.weight"].float())


def test_the_figures_are_those_of_the_definitions():
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 7, (5, 9), generator=generator)
    p, q = (
        [torch.log_softmax(torch.randn(8, 7, generator=generator), -1) for _ in windows] for _ in range(2)
    )
    found = _summary(p, q, windows)
    likelihood, divergence, agreement = [], [], []
    for a, b, ids in zip(p, q, windows, strict=True):
        for row in range(8):
            likelihood.append(-float(b[row, ids[row + 1]]))
            divergence.append(
                sum(math.exp(float(x)) * (float(x) - float(y)) for x, y in zip(a[row], b[row], strict=True))
            )
            agreement.append(int(a[row].argmax()) == int(b[row].argmax()))
    assert found["perplexity"][0] == pytest.approx(math.exp(np.mean(likelihood)), rel=1e-5)
    assert found["mean_kl"][0] == pytest.approx(np.mean(divergence), rel=1e-5)
    assert found["top1_agreement"][0] == pytest.approx(np.mean(agreement))
    for low_high in ("perplexity", "mean_kl", "top1_agreement"):
        middle, low, high = found[low_high]
        assert low < middle < high
    assert _summary(p, p, windows)["mean_kl"] == (0.0, 0.0, 0.0)


def test_goals_are_told_only_where_both_sides_ran():
    entry = {
        "perplexity": (2.0, 1.9, 2.1),
        "mean_kl": (0.01, 0.009, 0.011),
        "top1_agreement": (0.9, 0.8, 1.0),
    }
    own = {"weft best": Cost(10.0, 12.0, 400.0)}
    assert goals(own, {"weft best": entry}, "plain") == []
    quality = {
        "source": entry,
        "llm-compressor AWQ": {**entry, "mean_kl": (0.04, 0.03, 0.05)},
        "llm-compressor GPTQ": {**entry, "mean_kl": (0.02, 0.01, 0.03)},
        "weft best": entry,
    }
    rival = Cost(50.0, 60.0, 1000.0, 40.0)
    costs = {**own, "llm-compressor AWQ": rival, "llm-compressor GPTQ": rival}
    assert goals(costs, quality, "plain")[0] == "mean KL / llm-compressor GPTQ: 0.500 (goal 0.9)"
    assert "0.250 (goal 0.333)" in goals(costs, quality, "plain")[1]
    assert goals(costs, quality, "outliers")[0] == "mean KL / llm-compressor GPTQ: 0.500 (goal 0.5)"
    rows = table(costs, quality).splitlines()
    assert len(rows) == 6
    assert "| 0.01000 (0.00900 to 0.01100) | 90.00%" in rows[-1]


def test_planted_outliers_leave_the_function_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    from benchmarks.quant_outliers import plant_outliers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    planted = plant_outliers(tmp_path / "source", tmp_path / "planted")
    other = transformers.AutoModelForCausalLM.from_pretrained(planted).eval()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "planted"))
    name = "model.layers.1.input_layernorm.weight"
    assert float((after[name] / before[name]).max()) == pytest.approx(100.0)
    ids = torch.randint(0, 32, (1, 11))
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, other(ids).logits, atol=1e-5)
