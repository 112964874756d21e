"""From checkpoint to artifact: what is published, that it means what it says, and that it is made the same
way twice.
"""

import dataclasses
import errno
import json
import os
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open

import weft.artifact.publish as publish_module
from services.quantizer.calibration import evaluation_windows, load_tokenizer
from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.grid import round_to_nearest
from services.quantizer.job import run
from services.quantizer.quantize import BlockQuantizer
from services.quantizer.source import Source
from services.quantizer.texts import BUNDLED_EVALUATION, read_texts
from weft.artifact.store import ArtifactStore


@pytest.fixture
def quick(tmp_path):
    """quick(source, **changes) -> the configuration of a run of seconds."""

    def configure(source, **changes):
        values = {
            "samples": 4,
            "sequence_length": 64,
            "evaluation_tokens": 512,
            "group_size": 32,
            "threads": 1,
        }
        artifacts = tmp_path / "artifacts"
        return QuantizerConfig(source=source, artifacts=artifacts, name="tiny", **{**values, **changes})

    return configure


def read_gemm(artifact_path):
    """An independent reader of the AutoAWQ gemm layout: numpy-like, from the format's description alone."""
    tensors = {}
    for shard in artifact_path.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    group = json.loads((artifact_path / "config.json").read_text())["quantization_config"]["group_size"]

    def nibbles(words):
        out = torch.zeros(words.shape[0], words.shape[1] * 8)
        for column in range(words.shape[1]):
            for position, channel in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                bits = torch.bitwise_right_shift(words[:, column].long() & 0xFFFFFFFF, 4 * position) & 15
                out[:, 8 * column + channel] = bits.float()
        return out

    weights = {}
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        zeros, scales = nibbles(tensors.pop(f"{name}.qzeros")), tensors.pop(f"{name}.scales").float()
        spread = [t.repeat_interleave(group, 0) for t in (zeros, scales)]
        weights[f"{name}.weight"] = (
            (nibbles(tensors.pop(f"{name}.qweight")) - spread[0]) * spread[1]
        ).T.contiguous()
    return weights, tensors


THREE_REPEATS = {
    "hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 320,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dtype", "shape", "settings"),
    [
        ("Llama", torch.bfloat16, {}, {}),
        ("Qwen2", torch.bfloat16, {}, {}),
        ("Qwen2", torch.float16, THREE_REPEATS, {"group_size": 64, "propagate_error": False}),
        (
            "Llama",
            torch.float32,
            {"tie_word_embeddings": False, "num_key_value_heads": 4},
            {"group_size": 64},
        ),
        ("Llama", torch.bfloat16, {"hidden_size": 128, "head_dim": 64}, {"group_size": 128}),
    ],
)
def test_an_artifact_means_what_its_canary_and_quality_say(
    make_checkpoint, quick, transformers_logits, family, dtype, shape, settings
):
    source = make_checkpoint(family, dtype, **shape)
    artifact = run(quick(source, **settings))
    ArtifactStore(artifact.path.parents[1]).verify(artifact)
    weights, others = read_gemm(artifact.path)
    assert len(weights) == 14
    assert all(t.dtype == dtype for t in others.values())
    assert all(error.chosen <= error.rounding for error in artifact.manifest.linears.values())
    replaced = {**weights, **{name: tensor.float() for name, tensor in others.items()}}
    if "lm_head.weight" not in replaced:
        replaced["lm_head.weight"] = replaced["model.embed_tokens.weight"]
    for prompt in artifact.manifest.canary.prompts:
        logits = transformers_logits(source, torch.tensor([prompt.token_ids]), replaced)[0]
        top = logits.topk(2).values
        assert torch.allclose(top[:, 0] - top[:, 1], torch.tensor(prompt.margins), atol=1e-3)
        clear = torch.tensor(prompt.margins) > 1e-2
        expected = torch.tensor(prompt.expected_token_ids)
        assert torch.equal(logits.argmax(-1)[clear], expected[clear])
        logprobs = logits.log_softmax(-1).gather(-1, expected.unsqueeze(1)).squeeze(1)
        assert torch.allclose(logprobs, torch.tensor(prompt.logprobs), atol=1e-3)


def test_the_quality_is_that_of_whole_models(make_checkpoint, quick, transformers_logits):
    source = make_checkpoint("Qwen2", tie_word_embeddings=False)
    artifact = run(quick(source))
    texts, _ = read_texts(BUNDLED_EVALUATION)
    windows = evaluation_windows(load_tokenizer(source), texts, 512, 256, 4096)
    weights, others = read_gemm(artifact.path)
    replaced = {**weights, **{name: tensor.float() for name, tensor in others.items()}}
    log_p = transformers_logits(source, windows).log_softmax(-1)[:, :-1]
    log_q = transformers_logits(source, windows, replaced).log_softmax(-1)[:, :-1]
    quality = artifact.manifest.quality
    assert quality["tokens"] == windows.numel() == 512
    for variant, found in (("source", log_p), ("chosen", log_q)):
        likelihood = found.gather(-1, windows[:, 1:, None]).mean()
        assert quality[variant]["perplexity"] == pytest.approx(float((-likelihood).exp()), rel=1e-4)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert quality["chosen"]["mean_kl"] == pytest.approx(divergence, rel=1e-3)
    agreement = float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean())
    assert quality["chosen"]["greedy_agreement"] == pytest.approx(agreement, abs=0.005)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_no_linear_is_worse_than_rounding(make_checkpoint, quick, family):
    artifact = run(quick(make_checkpoint(family)))
    assert len(artifact.manifest.linears) == 14
    for name, error in artifact.manifest.linears.items():
        assert 0 < error.chosen <= error.rounding, name
    quality = artifact.manifest.quality
    assert quality["chosen"]["mean_kl"] < quality["rounding"]["mean_kl"]


@torch.inference_mode()
def test_the_layout_read_independently_is_within_rounding_of_the_folded_weights(make_checkpoint, quick):
    """The scales are known from the stored norm; q and k take no others."""
    directory = make_checkpoint("Llama", dtype=torch.float32)
    artifact = run(quick(directory))
    weights, others = read_gemm(artifact.path)
    source = Source(directory, torch.device("cpu"))
    original = source.block_weights(0)
    norm = original["input_layernorm.weight"]
    folded_norm = others["model.layers.0.input_layernorm.weight"].float()
    scales = torch.where(folded_norm != 0, norm / folded_norm, torch.ones_like(norm))
    for name in ("q_proj", "k_proj"):
        folded = original[f"self_attn.{name}.weight"] * scales
        read = weights[f"model.layers.0.self_attn.{name}.weight"]
        step = round_to_nearest(folded, 32).scales.float().repeat_interleave(32, 1)
        inside = (read - folded).abs() <= 0.51 * step
        # What lies outside was clipped on purpose; the search clips few.
        assert inside.float().mean() > 0.9
        assert (read - folded).norm() < 0.2 * folded.norm()


def test_the_files_of_an_artifact(make_checkpoint, quick):
    source = make_checkpoint()
    artifact = run(quick(source))
    names = set(os.listdir(artifact.path))
    assert names == {
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "report.json",
        "report.html",
        "manifest.json",
        "run.json",
    }
    assert set(artifact.manifest.files) == names - {"manifest.json", "run.json"}
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    template = json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    assert (artifact.path / "chat_template.jinja").read_text() == template
    index = json.loads((artifact.path / "model.safetensors.index.json").read_text())
    with safe_open(artifact.path / "model-00001-of-00001.safetensors", "pt") as file:
        assert set(index["weight_map"]) == set(file.keys())
    run_document = json.loads((artifact.path / "run.json").read_text())
    assert run_document["seconds"] > 0
    assert "<script" not in (artifact.path / "report.html").read_text()


def test_equal_runs_give_equal_bytes_and_another_seed_others(make_checkpoint, quick, tmp_path):
    source = make_checkpoint()
    first = run(quick(source))
    second = run(dataclasses.replace(quick(source), artifacts=tmp_path / "again"))
    assert first.manifest.digest == second.manifest.digest
    for name in first.manifest.files:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    third = run(dataclasses.replace(quick(source, seed=1), artifacts=tmp_path / "other"))
    assert third.manifest.digest != first.manifest.digest


def test_what_current_holds_is_not_made_again(make_checkpoint, quick):
    source = make_checkpoint()
    first = run(quick(source))
    before = (first.path / "run.json").stat().st_mtime_ns
    again = run(quick(source))
    assert again == first
    assert (first.path / "run.json").stat().st_mtime_ns == before
    assert run(quick(source, force=True)).version == first.version
    other = run(quick(source, propagate_error=False))
    assert other.version != first.version
    assert ArtifactStore(first.path.parents[1]).current("tiny") == other.version


def test_a_group_that_does_not_divide_is_named_or_left_whole(make_checkpoint, quick, transformers_logits):
    source = make_checkpoint(intermediate_size=80)  # down_proj reads 80 channels, gate and up write 80
    with pytest.raises(QuantizerError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: 80 inputs"):
        run(quick(source))
    artifact = run(quick(source, skip_indivisible=True))
    config = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    report = json.loads((artifact.path / "report.json").read_text())
    assert report["full_precision"] == config["modules_to_not_convert"]
    assert "model.layers.1.mlp.down_proj" in (artifact.path / "report.html").read_text()
    weights, others = read_gemm(artifact.path)
    assert len(weights) == 12
    original = Source(source, torch.device("cpu")).checkpoint
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(others[name], original.load(name))


def test_fused_sets_stay_together(make_checkpoint, quick):
    # k and v write 4 channels, which fill no word: q must stay in full precision with them.
    source = make_checkpoint(num_key_value_heads=1, num_attention_heads=16)
    artifact = run(quick(source, skip_indivisible=True))
    weights, others = read_gemm(artifact.path)
    assert not [name for name in weights if "q_proj" in name or "k_proj" in name or "v_proj" in name]
    assert "model.layers.0.self_attn.q_proj.weight" in others
    assert "model.layers.0.self_attn.o_proj.weight" in weights
    with pytest.raises(QuantizerError, match=r"k_proj\.weight: 64 inputs and 4 outputs"):
        run(quick(source))


def test_evaluation_can_be_left_out(make_checkpoint, quick):
    artifact = run(quick(make_checkpoint(), evaluation_tokens=0))
    assert artifact.manifest.quality is None
    assert artifact.manifest.canary is not None


def test_a_damaged_current_artifact_is_made_again(make_checkpoint, quick):
    source = make_checkpoint(num_hidden_layers=1)
    first = run(quick(source, evaluation_tokens=0))
    (first.path / "model-00001-of-00001.safetensors").write_bytes(b"rotten")
    again = run(quick(source, evaluation_tokens=0))
    assert again == first
    ArtifactStore(first.path.parents[1]).verify(again)


def test_no_more_than_the_asked_tokens_are_evaluated(make_checkpoint, quick):
    artifact = run(quick(make_checkpoint(num_hidden_layers=1), evaluation_tokens=300))
    assert artifact.manifest.quality["tokens"] == 300  # 150 of each of the two texts
    assert artifact.manifest.quality["predicted_tokens"] == 298


def test_one_block_at_a_time_is_in_memory(make_checkpoint, quick, monkeypatch):
    """When a block is loaded nothing of the ones before is left: neither weights nor what became of them."""
    alive = []
    load, quantize_block = Source.block_weights, BlockQuantizer.run

    def loaded(self, index):
        assert not [name for reference, name in alive if reference() is not None]
        weights = load(self, index)
        alive.extend((weakref.ref(tensor), f"{index}.{name}") for name, tensor in weights.items())
        return weights

    def quantized(self):
        block = quantize_block(self)
        alive.extend((weakref.ref(tensor), f"awq {name}") for name, tensor in block.weights.items())
        alive.extend((weakref.ref(linear.values), f"int4 {name}") for name, linear in block.linears.items())
        return block

    monkeypatch.setattr(Source, "block_weights", loaded)
    monkeypatch.setattr(BlockQuantizer, "run", quantized)
    run(quick(make_checkpoint(num_hidden_layers=3)))
    assert len(alive) > 3 * 16


def test_a_source_that_changes_meanwhile_is_not_published(make_checkpoint, quick, monkeypatch):
    source = make_checkpoint(num_hidden_layers=1)
    quantize_block = BlockQuantizer.run

    def meddle(self):
        with (source / "tokenizer.json").open("a") as file:
            file.write("\n")
        return quantize_block(self)

    monkeypatch.setattr(BlockQuantizer, "run", meddle)
    with pytest.raises(QuantizerError, match=r"tokenizer\.json: changed during the run"):
        run(quick(source))


def test_a_snapshot_of_the_hubs_cache_is_a_source(make_checkpoint, quick, tmp_path):
    source = make_checkpoint(num_hidden_layers=1)
    blobs = tmp_path / "models--someone--tiny" / "blobs"
    snapshot = blobs.parent / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    artifact = run(quick(snapshot, evaluation_tokens=0))
    assert run(quick(source, evaluation_tokens=0)) == artifact  # the same bytes, so up to date


class DiskFullOs:
    """Stands for `os` inside of the publisher: the n-th write, sync or rename finds no space."""

    def __init__(self, fail_at):
        self.fail_at, self.calls, self.has_failed = fail_at, 0, False

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("write", "fsync", "rename", "replace"):
            return real

        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.fail_at:
                self.has_failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call


def test_a_full_disk_anywhere_in_a_run_leaves_the_old_version(make_checkpoint, quick, monkeypatch):
    source = make_checkpoint(num_hidden_layers=1)
    first = run(quick(source, evaluation_tokens=0))
    monkeypatch.setattr(publish_module, "os", counting := DiskFullOs(-1))
    run(quick(source, evaluation_tokens=0, seed=1))
    total = counting.calls
    monkeypatch.setattr(publish_module, "os", os)
    store = ArtifactStore(first.path.parents[1])
    store.root.joinpath("tiny", "CURRENT").write_text(first.version + "\n")
    for fail_at in [*range(1, total, 16), total - 2, total - 1, total]:
        faulty = DiskFullOs(fail_at)
        monkeypatch.setattr(publish_module, "os", faulty)
        with pytest.raises(OSError, match="No space"):
            run(quick(source, evaluation_tokens=0, seed=2))
        monkeypatch.setattr(publish_module, "os", os)
        assert faulty.has_failed
        assert store.current("tiny") == first.version
        store.verify(store.open("tiny"))
        hidden = [name for name in os.listdir(store.root / "tiny") if name.startswith(".")]
        assert all(name.startswith(".work-") for name in hidden)  # to go on from, no more
