"""Loading from the artifact store: identity, digests, and the canary that must sing the same song."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels.kv_format import FORMATS
from services.engine.runner.canary import CanaryError, bounds_of, replay_canary
from services.engine.runner.config import RunnerConfig
from services.engine.runner.model_runner import ModelRunner, load_runner
from tests.services.engine.models.checkpoints import dequantize_checkpoint
from weft.artifact.checkpoint import CheckpointError
from weft.artifact.manifest import (
    ArtifactError,
    ArtifactNotFound,
    Canary,
    CanaryPrompt,
    DigestMismatch,
    Manifest,
)
from weft.artifact.store import ArtifactStore

DIGEST = "sha256:" + "0" * 64


@pytest.fixture(scope="session")
def canary(packed_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Canary:
    """What `transformers` answers with the dequantised weights."""
    transformers = pytest.importorskip("transformers")
    plain = dequantize_checkpoint(packed_demo, tmp_path_factory.mktemp("plain") / "demo")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    prompts = []
    for seed in range(3):
        ids = torch.randint(6, 4096, (1, 40), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            logits = model(ids).logits[0]
        top = logits.topk(2, dim=-1)
        logprobs = logits.log_softmax(-1).gather(-1, top.indices[:, :1]).squeeze(1)
        margins = top.values[:, 0] - top.values[:, 1]
        columns = (ids[0], top.indices[:, 0], logprobs, margins)
        prompts.append(CanaryPrompt(*(tuple(column.tolist()) for column in columns)))
    return Canary(tuple(prompts))


Publish = Callable[..., ArtifactStore]


@pytest.fixture
def publish(packed_demo: Path, tmp_path: Path, canary: Canary) -> Publish:
    """Publishes the packed demo, with its canary or another and tensors changed before, as demo/v1."""

    def run(
        canary: Canary | None = canary, change: Callable[[dict[str, torch.Tensor]], None] | None = None
    ) -> ArtifactStore:
        store = ArtifactStore(tmp_path / "artifacts")
        tensors = load_file(packed_demo / "model.safetensors")
        if change is not None:
            change(tensors)
        save_file(tensors, tmp_path / "changed.safetensors")
        with store.stage("demo") as staging:
            staging.write("config.json", (packed_demo / "config.json").read_bytes())
            staging.write("model.safetensors", (tmp_path / "changed.safetensors").read_bytes())
            manifest = Manifest("demo", dict(staging.files), DIGEST, {}, 0, DIGEST, DIGEST, canary=canary)
            staging.publish(manifest, "v1", b"{}")
        return store

    return run


def _load(store: ArtifactStore, **settings: Any) -> ModelRunner:
    return load_runner(
        RunnerConfig(**{"artifacts": store.root, "model": "demo", "num_blocks": 8, **settings})
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_artifact_is_loaded_and_its_canary_agrees(publish: Publish, dtype: str) -> None:
    store = publish()
    runner = _load(store, dtype=dtype, is_poisoned=True)
    manifest = store.open("demo").manifest
    assert (runner.info.model_name, runner.info.artifact_version) == ("demo", "v1")
    assert (runner.info.artifact_digest, runner.info.tokenizer_digest) == (manifest.digest, DIGEST)
    assert bool(torch.isnan(runner.cache.data).all()), "the load leaves nothing in the cache"


def test_wrong_weights_are_refused_by_the_canary(publish: Publish) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        a, b = (f"model.layers.{index}.mlp.up_proj.qweight" for index in (1, 4))
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()

    with pytest.raises(CanaryError, match="canary prompt 0"):
        _load(publish(change=swap), dtype="float32")


def test_the_replay_holds_each_position_to_its_bounds(publish: Publish, canary: Canary) -> None:
    runner = _load(publish(), dtype="float32")
    first = canary.prompts[0]
    strong = max(range(40), key=lambda position: first.margins[position])
    weak = min(range(40), key=lambda position: first.margins[position])
    assert first.margins[strong] > 0.5 > first.margins[weak]

    def replay(prompt: CanaryPrompt, length: int = 1024) -> int:
        return replay_canary(Canary((prompt,)), runner.model, runner.cache, torch.float32, length)

    def changed(values: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
        return (*values[:position], value, *values[position + 1 :])

    assert replay(first) == 40
    assert replay(first, 7) == 7
    wrong = replace(first, expected_token_ids=changed(first.expected_token_ids, strong, 7))
    with pytest.raises(CanaryError, match=f"position {strong}: token {first.expected_token_ids[strong]}"):
        replay(wrong)
    drifted = replace(first, logprobs=changed(first.logprobs, weak, first.logprobs[weak] + 0.002))
    with pytest.raises(CanaryError, match=rf"position {weak}: logprob .* at most 0\.001"):
        replay(drifted)
    with pytest.raises(CanaryError, match="outside of the vocabulary"):
        replay(replace(first, token_ids=changed(first.token_ids, 3, 4096)))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "margin", "logprob"),
    [
        ("float32", "float32", 0.5, 0.001),
        ("float32", "bfloat16", 0.5, 0.15),
        ("bfloat16", "float32", 0.5, 0.15),
        ("float32", "int8", 0.5, 0.3),
        ("bfloat16", "fp8", 0.5, 0.3),
        ("bfloat16", "int4", 1.0, 1.0),
    ],
)
def test_bounds_follow_activations_and_cache(
    dtype: str, kv_dtype: str, margin: float, logprob: float
) -> None:
    assert bounds_of(getattr(torch, dtype), FORMATS[kv_dtype]) == (margin, logprob)


def test_a_quantised_cache_has_wider_bounds_and_is_named_beyond_them(
    publish: Publish, canary: Canary
) -> None:
    store = publish()
    for kv_dtype in ("fp8", "int4"):
        assert _load(store, dtype="float32", kv_dtype=kv_dtype).info.kv_dtype == kv_dtype
    runner = _load(store, dtype="float32", kv_dtype="int8")
    prompt = canary.prompts[0]
    for drift, is_accepted in ((0.2, True), (0.4, False)):
        logprobs = (prompt.logprobs[0] + drift, *prompt.logprobs[1:])
        drifted = Canary((replace(prompt, logprobs=logprobs),))
        if is_accepted:
            assert replay_canary(drifted, runner.model, runner.cache, torch.float32, 1024) == 40
            continue
        with pytest.raises(CanaryError, match=r"position 0: .* at most 0\.3 .* stored in int8\)"):
            replay_canary(drifted, runner.model, runner.cache, torch.float32, 1024)


@pytest.mark.parametrize("prompts", [(), (CanaryPrompt((), (), (), ()),)])
def test_a_canary_that_checks_nothing_is_refused(publish: Publish, prompts: tuple[CanaryPrompt, ...]) -> None:
    with pytest.raises(CanaryError, match="no position"):
        _load(publish(Canary(prompts)), dtype="float32")


def test_an_artifact_without_a_canary_is_served_with_a_warning(
    publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    _load(publish(), dtype="float32")
    assert "no canary" not in caplog.text
    _load(publish(canary=None), dtype="float32")
    assert "no canary" in caplog.text


def test_a_weak_lead_may_turn(publish: Publish, canary: Canary) -> None:
    """Top-1 may differ where the lead is small, as long as the expected token's logprob is right."""
    runner = _load(publish(), dtype="float32")
    ids = list(canary.prompts[0].token_ids[:5])
    sequence = Sequence("c", ids, SamplingParams(max_tokens=1))
    sequence.block_table = [0]
    logits = runner.forward([Chunk(sequence, 0, 5, True)])[0]
    second = int(logits.topk(2).indices[1])
    logprob = float(logits.double().log_softmax(-1)[second])
    first = canary.prompts[0]
    prompt = CanaryPrompt(
        tuple(ids),
        (*first.expected_token_ids[:4], second),
        (*first.logprobs[:4], logprob),
        (*first.margins[:4], 0.4),
    )
    assert replay_canary(Canary((prompt,)), runner.model, runner.cache, torch.float32, 1024) == 5
    with pytest.raises(CanaryError, match="position 4"):
        replay_canary(
            Canary((replace(prompt, margins=(*first.margins[:4], 0.6)),)),
            runner.model,
            runner.cache,
            torch.float32,
            1024,
        )


def test_a_changed_byte_is_a_digest_mismatch(publish: Publish) -> None:
    store = publish()
    path = store.open("demo").path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))
    with pytest.raises(DigestMismatch) as caught:
        _load(store, dtype="float32")
    assert caught.value.file == "model.safetensors"


def test_unknown_models_and_versions(publish: Publish) -> None:
    store = publish()
    for settings in ({"model": "other"}, {"version": "v9"}, {"model": "../demo"}):
        with pytest.raises(ArtifactNotFound):
            _load(store, **settings)


def test_an_artifact_has_no_subnormal_scale(publish: Publish) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.mlp.down_proj.scales"][2, 9] = 2.0**-15

    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj\.scales .* subnormal"):
        _load(publish(canary=None, change=shrink), dtype="float32")


def test_a_bad_generation_config_is_refused(packed_demo: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((packed_demo / name).read_bytes())

    def load(generation: Any) -> tuple[int, ...]:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return load_runner(RunnerConfig(source=tmp_path, dtype="float32", num_blocks=2)).info.eos_token_ids

    assert load({"eos_token_id": [5, 2, 5]}) == (2, 5)
    assert load({}) == (1,)
    for bad in ([], {"eos_token_id": 4096}, {"eos_token_id": "1"}):
        with pytest.raises((ValueError, ArtifactError)):
            load(bad)
