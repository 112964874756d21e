"""Every format in: the artifact holds the integers, zero points and scales of the source, and a canary that
the library's own model confirms.
"""

import json

import pytest
import torch

from services.quantizer.importing.config import ImportConfig
from services.quantizer.importing.job import run_import
from weft.artifact.store import ArtifactStore


@pytest.fixture
def import_it(tmp_path):
    """import_it(directory, **flags) -> the artifact."""

    def attempt(directory, **flags):
        return run_import(
            ImportConfig(source=directory, artifacts=tmp_path / "artifacts", name="tiny", **flags)
        )

    return attempt


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        for field in ("values", "zeros", "scales"):
            assert torch.equal(getattr(found[name], field), getattr(weight, field)), (name, field)
        assert found[name].scales.dtype == torch.float16


@pytest.mark.parametrize(
    "name", ["gemm", "gemv", "gptq", "gptq_v2", "pack-quantized", "pack-quantized symmetric"]
)
def test_integers_zeros_and_scales_arrive_unchanged(make_quantized, import_it, read_artifact, name):
    directory, expected = make_quantized(name)
    artifact = import_it(directory)
    found, others = read_artifact(artifact.path)
    assert_equal(found, expected)
    assert {t.dtype for t in others.values()} == {torch.bfloat16}
    assert len(expected) == 14
    ArtifactStore(artifact.path.parents[1]).verify(artifact)
    config = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "awq"
    assert config["group_size"] == 32
    assert config["modules_to_not_convert"] is None


def test_the_canary_is_what_the_library_answers(make_quantized, import_it, transformers_logits):
    directory, weights = make_quantized("gptq", family="Qwen2", tie_word_embeddings=False)
    artifact = import_it(directory)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    for prompt in artifact.manifest.canary.prompts:
        dense = {f"{name}.weight": weight.dequantize() for name, weight in weights.items()}
        logits = transformers_logits(directory, torch.tensor([prompt.token_ids]), dense)[0]
        assert logits.argmax(-1).tolist() == list(prompt.expected_token_ids)
        logprobs = torch.log_softmax(logits, -1).amax(-1)
        torch.testing.assert_close(logprobs, torch.tensor(prompt.logprobs), atol=2e-4, rtol=0)


def test_an_import_that_is_current_is_not_made_again(make_quantized, import_it):
    directory, _ = make_quantized("gemm")
    first = import_it(directory)
    before = (first.path / "run.json").stat().st_mtime_ns
    assert import_it(directory).version == first.version
    assert (first.path / "run.json").stat().st_mtime_ns == before
    forced = import_it(directory, force=True)
    assert forced.version == first.version
    assert import_it(directory, allow_requantize=True).version != first.version


@pytest.mark.parametrize("name", ["gemm", "gptq_v2", "pack-quantized"])
def test_one_scale_per_row_becomes_groups(make_quantized, import_it, read_artifact, name):
    size = None if name == "pack-quantized" else -1

    def describe(document):
        if size:
            document["quantization_config"]["group_size"] = size

    directory, expected = make_quantized(name, None, change_config=describe)
    artifact = import_it(directory)
    config = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 64  # 128 does not divide the hidden size
    found, _ = read_artifact(artifact.path)
    for full, weight in expected.items():
        assert torch.equal(found[full].dequantize(), weight.dequantize())


def test_what_was_left_out_stays_out_and_empty_biases_go(make_quantized, import_it, read_artifact):
    def add_biases(tensors):
        for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
            tensors.setdefault(f"{name}.bias", torch.zeros(tensors[f"{name}.qweight"].shape[1]).half())

    directory, expected = make_quantized(
        "gptq", change_tensors=add_biases, skip=("mlp.down_proj",), family="Qwen2"
    )
    artifact = import_it(directory)
    config = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    found, others = read_artifact(artifact.path)
    assert_equal(found, expected)
    biases = {name.split(".", 3)[3] for name in others if name.endswith(".bias")}
    assert biases == {f"self_attn.{part}_proj.bias" for part in "qkv"}


def test_scales_in_other_dtypes_are_taken_when_fp16_holds_them(make_quantized, import_it, read_artifact):
    def widen(tensors):
        for name in [n for n in tensors if n.endswith(".weight_scale")]:
            tensors[name] = tensors[name].float()

    directory, expected = make_quantized("pack-quantized", change_tensors=widen)
    found, _ = read_artifact(import_it(directory).path)
    assert_equal(found, expected)
