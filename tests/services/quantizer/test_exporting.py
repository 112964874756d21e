"""An artifact in another format: the same integers, zero points and scales, in a directory for others."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.quantizer.__main__ import main
from services.quantizer.grid import round_to_nearest
from services.quantizer.importing.config import ImportConfig
from services.quantizer.importing.job import run_import
from services.quantizer.packed_linear import packed
from weft.artifact.store import ArtifactStore


@pytest.fixture
def rounded_checkpoint(make_checkpoint):
    """Rounded to AutoAWQ gemm by hand, all but down_proj."""
    directory = make_checkpoint("Qwen2", tie_word_embeddings=False)
    tensors = load_file(directory / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight") and "down_proj" not in n]:
        weight = round_to_nearest(tensors.pop(name).float(), 32)
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}{suffix}": t.contiguous() for suffix, t in packed(weight).items()}
    save_file(tensors, directory / "model.safetensors")
    document = json.loads((directory / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (directory / "config.json").write_text(json.dumps(document))
    return directory


@pytest.fixture
def artifact(rounded_checkpoint, tmp_path):
    """Of that checkpoint."""
    return run_import(ImportConfig(source=rounded_checkpoint, artifacts=tmp_path / "artifacts", name="tiny"))


def export(artifact, out, *flags):
    root = artifact.path.parents[1]
    return main(["export", "--artifacts", str(root), "--name", "tiny", "--out", str(out), *flags])


def tensors_of(directory):
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        tensors.update(load_file(shard))
    return tensors


def test_there_and_back_gives_the_same_bytes(artifact, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(artifact, out, "--format", "compressed-tensors") == 0
    assert capsys.readouterr().out.splitlines()[0] == str(out)
    assert not (out / "manifest.json").exists()
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))]
    other = tensors_of(out)
    assert sum(name.endswith(".weight_packed") for name in other) == 12
    back = run_import(ImportConfig(source=out, artifacts=tmp_path / "artifacts", name="back"))
    found, expected = tensors_of(back.path), tensors_of(artifact.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    quantization = [
        json.loads((a.path / "config.json").read_text())["quantization_config"] for a in (back, artifact)
    ]
    assert quantization[0] == quantization[1]
    assert {path.name for path in out.iterdir()} >= {"tokenizer.json", "generation_config.json"}


def test_a_damaged_artifact_is_not_exported(artifact, tmp_path, capsys):
    (shard,) = artifact.path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert export(artifact, tmp_path / "out") == 1
    assert "expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(artifact, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert export(artifact, out) == 1
    assert f"--out: {out} exists already" in capsys.readouterr().err
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--format", "gguf"), "--format"), (("--name", "../x"), "--name"), (("--version", "A"), "--version")],
)
def test_wrong_usage(artifact, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        export(artifact, tmp_path / "out", *flags)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_failure_leaves_nothing(artifact, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("services.quantizer.shards.write_tensors", full)
    assert export(artifact, tmp_path / "out") == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    assert ArtifactStore(artifact.path.parents[1]).open("tiny").version == artifact.version
