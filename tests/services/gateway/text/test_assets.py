"""Which files the gateway takes for an engine, and which it does not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from services.gateway.text.assets import AssetError, AssetSource
from services.gateway.text.generation_config import GenerationDefaults
from weft.artifact.manifest import FileEntry, Manifest
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb

NAMES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def published(tmp_path: Path, demo_model: Path) -> Path:
    """An artifact with the text side alone."""
    directory = tmp_path / "demo" / "v1"
    directory.mkdir(parents=True)
    files = {}
    for name in NAMES:
        data = (demo_model / name).read_bytes()
        (directory / name).write_bytes(data)
        files[name] = FileEntry(sha256=sha256(data), size=len(data))
    manifest = Manifest(
        model="demo",
        files=files,
        source_digest="sha256:" + "0" * 64,
        recipe={},
        seed=0,
        calibration_digest="sha256:" + "0" * 64,
        tokenizer_digest="sha256:" + files["tokenizer.json"].sha256,
    )
    (directory / "manifest.json").write_bytes(manifest.to_bytes())
    (tmp_path / "demo" / "CURRENT").write_text("v1\n")
    return tmp_path


def info(demo_model: Path, **fields: Any) -> engine_pb.GetInfoResponse:
    known = {
        "model_name": "demo",
        "artifact_version": "v1",
        "tokenizer_digest": "sha256:" + sha256((demo_model / "tokenizer.json").read_bytes()),
    }
    return engine_pb.GetInfoResponse(**{**known, **fields})


async def test_an_artifact_is_read(published: Path, demo_model: Path) -> None:
    source = AssetSource(artifacts=published)
    try:
        assets = await source.load(info(demo_model))
        assert await source.load(info(demo_model)) is assets
        assert assets.template is not None
        assert await assets.template.render([{"role": "user", "content": "x"}]) == (
            "<|bos|><|user|>x<|end|><|assistant|>"
        )
        assert assets.defaults.eos_token_ids == (1,)
    finally:
        await source.close()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tokenizer_digest": "sha256:0"}, "digest differs"),
        ({"tokenizer_digest": ""}, "no tokenizer digest"),
        ({"artifact_version": "v2"}, "v2"),
        ({"artifact_version": "../v1"}, "v1"),
        ({"model_name": "other"}, "other"),
        ({"model_name": "../demo"}, "demo"),
    ],
)
async def test_another_engine_is_refused(
    published: Path, demo_model: Path, fields: dict[str, str], text: str
) -> None:
    with pytest.raises(AssetError, match=text):
        await AssetSource(artifacts=published).load(info(demo_model, **fields))


async def test_a_changed_file_is_refused(published: Path, demo_model: Path) -> None:
    path = published / "demo" / "v1" / "tokenizer_config.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(AssetError, match=r"tokenizer_config\.json"):
        await AssetSource(artifacts=published).load(info(demo_model))


async def test_a_directory_is_read_and_compared(tmp_path: Path, demo_model: Path) -> None:
    data = (demo_model / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data)
    source = AssetSource(directory=tmp_path)
    try:
        assets = await source.load(info(demo_model))
        assert assets.template is None
        assert assets.template_problem == "this model has no chat template"
        (tmp_path / "tokenizer.json").write_bytes(data + b"\n")
        with pytest.raises(AssetError, match="digest differs"):
            await AssetSource(directory=tmp_path).load(info(demo_model))
    finally:
        await source.close()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"chat_template": "{% for %}"}, "invalid"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, "no chat template"),
        ({"chat_template": 5}, "no chat template"),
    ],
)
async def test_a_bad_template_costs_chat_alone(
    tmp_path: Path, demo_model: Path, config: dict[str, Any], problem: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((demo_model / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    source = AssetSource(directory=tmp_path)
    try:
        assets = await source.load(info(demo_model))
        assert assets.template is None
        assert problem in assets.template_problem
    finally:
        await source.close()


def test_generation_config_gives_what_is_usable() -> None:
    defaults = GenerationDefaults.parse(
        {
            "temperature": 0.7,
            "top_p": 5.0,
            "top_k": 40,
            "repetition_penalty": "much",
            "eos_token_id": [3, 4, -1, True],
        }
    )
    assert defaults.eos_token_ids == (3, 4)
    sampling = pb.SamplingParams(top_k=0)
    defaults.apply(sampling)
    assert sampling.top_k == 0
    assert round(sampling.temperature, 3) == 0.7
    assert not sampling.HasField("top_p")
    assert not sampling.HasField("repetition_penalty")


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "repetition_penalty", "eos_token_id"])
def test_a_number_of_400_digits_is_no_default(name: str) -> None:
    defaults = GenerationDefaults.parse({name: 10**400})
    assert not defaults.sampling.ListFields()
    assert defaults.eos_token_ids == ()


async def test_what_is_in_use_is_not_closed(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((demo_model / "tokenizer.json").read_bytes())
    used: list[Any] = []
    source = AssetSource(directory=tmp_path, in_use=lambda: used)
    try:
        first = await source.load(info(demo_model, artifact_version="v0"))
        used.append(first)
        second = await source.load(info(demo_model, artifact_version="v1"))
        for number in range(2, 8):
            await source.load(info(demo_model, artifact_version=f"v{number}"))
        text = "stormy night, " * 5000  # long enough for the tokenizer's threads
        assert await first.tokenizer.encode_text(text)
        with pytest.raises(RuntimeError):
            await second.tokenizer.encode_text(text)
    finally:
        await source.close()
