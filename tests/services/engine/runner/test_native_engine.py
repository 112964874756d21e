"""An engine on the native kernels: which it takes, what it promises, how its logits compare with torch's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels import native
from services.engine.kernels.numerics import Numerics
from services.engine.models.loader import read_model_config
from services.engine.models.quantization import QuantizationConfig
from services.engine.runner import load
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from services.engine.runner.model_runner import ModelRunner, load_runner
from weft.artifact.checkpoint import Checkpoint

LENGTHS = (150, 40, 33)


@pytest.fixture(scope="module", autouse=True)
def _put_back() -> object:
    before = native.active()
    yield
    native.use(before)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kernels")
    if native.library(directory) is None:
        pytest.skip("no compiler, or a processor without AVX-512 BF16")
    return directory


def _load(source: Path, cache_dir: Path | None, **settings: object) -> ModelRunner:
    chosen = {"dtype": "bfloat16", "num_blocks": 16, "is_poisoned": True, "cache_dir": cache_dir} | settings
    runner = load_runner(RunnerConfig(source=source, **chosen))  # type: ignore[arg-type]
    assert isinstance(runner, ModelRunner)
    return runner


def _sequences(vocab_size: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(7)
    sequences = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        sequence = Sequence(key=index, prompt_token_ids=ids, params=SamplingParams(max_tokens=1))
        sequence.block_table = [3 * index, 3 * index + 1]
        sequences.append(sequence)
    return sequences


def _logits(runner: ModelRunner) -> torch.Tensor:
    """Of each sequence's last token, computed in one batch."""
    return runner.forward([Chunk(s, 0, len(s), True) for s in _sequences(runner.info.vocab_size)])


def test_it_is_taken_and_keeps_a_rows_bits(packed_demo: Path, cache_dir: Path) -> None:
    runner = _load(packed_demo, cache_dir)
    paths = runner.info.kernel_paths
    assert {name: paths[name] for name in ("qkv", "output", "gate_up", "down", "head")} == {
        "qkv": "native-int4",
        "output": "native-int4",
        "gate_up": "native-int4",
        "down": "native-int4",
        "head": "native-int8",
    }
    assert paths["attention"].startswith("native")
    assert runner.info.is_deterministic
    assert runner.info.crossover_rows is None
    together = _logits(runner)
    for index, sequence in enumerate(_sequences(runner.info.vocab_size)):
        half = len(sequence) // 2
        runner.forward([Chunk(sequence, 0, half, False)])
        for start in range(half, len(sequence)):
            is_last = start == len(sequence) - 1
            row = runner.forward([Chunk(sequence, start, 1, is_last)])
        assert torch.equal(row[0], together[index])


def test_its_logits_are_those_of_float32(packed_demo: Path, cache_dir: Path) -> None:
    exact = _logits(_load(packed_demo, cache_dir, dtype="float32"))
    scale = float(exact.std())
    for settings in ({}, {"quantize_head": "none"}, {"has_native_kernels": False}):
        found = _logits(_load(packed_demo, cache_dir, **settings))
        assert float((found - exact).abs().max()) < 0.1 * scale, settings


@pytest.mark.parametrize(
    ("setting", "is_packed", "path"),
    [("auto", True, "native-int8"), ("none", True, "native-bf16"), ("int8", True, "native-int8"),
     ("auto", False, "native-bf16"), ("int8", False, "native-int8")],
)  # fmt: skip
def test_the_head(
    setting: str, is_packed: bool, path: str, packed_demo: Path, demo_model: Path, cache_dir: Path
) -> None:
    runner = _load(packed_demo if is_packed else demo_model, cache_dir, quantize_head=setting)
    assert runner.info.kernel_paths["head"] == path


def test_told_not_to_it_is_not_used(packed_demo: Path, cache_dir: Path) -> None:
    runner = _load(packed_demo, cache_dir, has_native_kernels=False)
    assert not any("native" in path for path in runner.info.kernel_paths.values())
    assert not runner.info.is_deterministic


def test_without_a_compiler_torch_serves(
    packed_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    runner = _load(packed_demo, tmp_path / "none", quantize_head="int8")
    assert runner.info.kernel_paths["head"] == "dense"
    assert "the output head stays as it is stored" in caplog.text
    assert bool(_logits(runner).isfinite().all())
    with pytest.raises(RunnerConfigError, match="native kernels"):
        _load(packed_demo, tmp_path / "none", is_deterministic=True)


@pytest.mark.parametrize("is_deterministic", [None, True])
def test_auto_takes_it_and_keeps_the_promise(
    is_deterministic: bool | None, packed_demo: Path, cache_dir: Path
) -> None:
    info = _load(packed_demo, cache_dir, dtype="auto", is_deterministic=is_deterministic).info
    assert (info.dtype, info.is_deterministic) == ("bfloat16", True)
    assert info.kernel_paths["qkv"] == "native-int4"


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"kv_dtype": "int8"}, {}),
        ({"has_native_kernels": False}, {}),
        ({}, {"head_dim": 80}),
        ({}, {"head_dim": 512}),
        ({}, {"num_heads": 130, "num_kv_heads": 1}),
        ({}, {"attention_softcap": 30.0}),
        ({}, {"intermediate_size": 772}),
        ({}, {"hidden_size": 260}),
        ({}, {"quantization": QuantizationConfig(4, ())}),
    ],
    ids=repr,
)
def test_auto_leaves_it_where_a_product_would_be_torchs(
    settings: dict[str, object], changes: dict[str, object], demo_model: Path, cache_dir: Path
) -> None:
    config = RunnerConfig(source=demo_model, cache_dir=cache_dir, **settings)  # type: ignore[arg-type]
    demo = read_model_config(Checkpoint.open(demo_model))
    whole = replace(config, kv_dtype="auto", has_native_kernels=True)
    assert load.choose_numerics(whole, demo).dtype == torch.bfloat16
    model = replace(demo, **changes)  # type: ignore[arg-type]
    assert load.choose_numerics(config, model) == Numerics(torch.float32, is_deterministic=True)
    assert native.active() is None


def test_float32_is_left_alone(packed_demo: Path, cache_dir: Path) -> None:
    runner = _load(packed_demo, cache_dir, dtype="float32")
    assert not any("native" in path for path in runner.info.kernel_paths.values())


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunnerConfigError, match="quantize_head"):
        RunnerConfig(source=tmp_path, quantize_head="int3")
    with pytest.raises(RunnerConfigError, match="int8 is for CPUs"):
        RunnerConfig(source=tmp_path, device="cuda", quantize_head="int8")
