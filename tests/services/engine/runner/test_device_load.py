"""Loading onto an accelerator: what is measured, what is refused, and how. CUDA's counters are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.engine.kernels.kv_format import FORMATS
from services.engine.kernels.numerics import Numerics
from services.engine.models.loader import load_model, read_model_config
from services.engine.runner import device_load
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from services.engine.runner.device_load import (
    _Loading,
    check_head_dim,
    least_weight_bytes,
    load_device_runner,
)
from services.engine.runner.kv_cache import choose_kv_format, kv_bytes_per_token
from services.engine.runner.load import numerics_id, weight_bytes
from services.engine.runner.memory_budget import MemoryBudget
from services.engine.runner.self_test import _check_linears
from services.engine.runner.source import open_source
from tests.services.engine.models.checkpoints import LLAMA, quantize_checkpoint, write_checkpoint
from weft.artifact.checkpoint import Checkpoint

MIB = 1 << 20
KEPT, STEP, OUTSIDE = 5 * MIB, 3 * MIB, 2 * MIB
"""What the engine of these tests holds beside weights, takes during its largest step, and CUDA itself."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in fp32."""
    place = tmp_path_factory.mktemp("model")
    return write_checkpoint(place / "plain", {**LLAMA, "num_hidden_layers": 1})


def config_of(source: Path, **options: Any) -> RunnerConfig:
    return RunnerConfig(source=source, device="cuda", dtype="float32", block_size=16, **options)


class FakeDevice:
    """torch.cuda's counters; `hold` is what torch's allocator holds now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, weights: int) -> None:
        self.free = 64 * MIB
        self.hold = self.peak = weights
        for name, function in {
            "empty_cache": lambda: None,
            "synchronize": lambda _: None,
            "reset_peak_memory_stats": self.reset,
            "max_memory_allocated": lambda _: self.peak,
            "memory_reserved": lambda _: self.peak,
            "mem_get_info": lambda _: (self.free - self.peak - OUTSIDE, 100 * MIB),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def reset(self, device: Any) -> None:
        self.peak = self.hold

    def take(self, num_bytes: int) -> None:
        self.hold += num_bytes
        self.peak = max(self.peak, self.hold)


class FakeRunner:
    """Makes its buffers when it warms up, and steps."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def warm_up(self) -> None:
        self.device.take(KEPT)
        self.device.take(STEP)
        self.device.take(-STEP)


@pytest.fixture
def loading(plain: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a model loaded on the made-up device."""

    def make(**options: Any) -> tuple[_Loading, MemoryBudget]:
        config = config_of(plain, max_model_len=64, **options)
        source = open_source(config)
        model_config = read_model_config(source.checkpoint)
        numerics = Numerics(torch.float32, is_deterministic=False)
        model = load_model(source.checkpoint, model_config, numerics, 64)
        kv_format = choose_kv_format(config, model_config, numerics.dtype)
        made = _Loading(config, source, model, numerics, kv_format, 64)
        device = FakeDevice(monkeypatch, weight_bytes(model))
        cache = made._cache

        def small_cache(num_blocks: int) -> Any:
            assert num_blocks == 1
            allocated = cache(num_blocks)
            device.take(allocated.num_bytes)
            return allocated

        def runner(*_: Any, has_graphs: bool) -> FakeRunner:
            assert not has_graphs, "what graphs take is not in the peak"
            return FakeRunner(device)

        monkeypatch.setattr(made, "_cache", small_cache)
        monkeypatch.setattr(made, "_runner", runner)
        wanted = config.gpu_memory
        limit = wanted if isinstance(wanted, int) else 60 * MIB
        return made, MemoryBudget(100 * MIB, device.free, limit)

    return make


def test_whatever_a_warm_engine_holds_is_not_the_caches(loading: Any) -> None:
    made, budget = loading(has_graphs=False)
    block = 16 * kv_bytes_per_token(made.model.config, made.kv_format)
    used = weight_bytes(made.model) + KEPT + STEP + OUTSIDE + (made.num_blocks(budget) + 1) * block
    assert used <= budget.limit < used + block


def test_graphs_are_provided_for_when_there_are_any(loading: Any) -> None:
    made, budget = loading(max_batch_size=4)
    with pytest.raises(RunnerConfigError, match=r"graphs 0\.50 GiB"):
        made.num_blocks(budget)


def test_a_cache_of_a_given_size_is_held_to_the_limit_and_else_to_what_is_free(loading: Any) -> None:
    made, budget = loading()
    block = 16 * kv_bytes_per_token(made.model.config, made.kv_format)
    rest = weight_bytes(made.model) + KEPT + STEP + OUTSIDE
    most = (budget.free - rest) // block - 1
    assert most > (budget.limit - rest) // block - 1
    assert loading(num_blocks=most)[0].num_blocks(budget) == most
    with pytest.raises(RunnerConfigError, match="is asked for"):
        loading(num_blocks=most + 1)[0].num_blocks(budget)
    made, budget = loading(kv_memory_bytes=(most + 1) * block, gpu_memory=60 * MIB)
    with pytest.raises(RunnerConfigError, match="is asked for"):
        made.num_blocks(budget)


def test_weights_are_counted_as_they_will_lie_on_the_device(plain: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(plain)
    stored = (plain / "model.safetensors").stat().st_size
    in_fp32 = least_weight_bytes(opened, torch.float32)
    assert 0 < stored - in_fp32 < 16_384, "the rest is the header"
    assert 2 * least_weight_bytes(opened, torch.bfloat16) == in_fp32, "stored in fp32, served in bf16"
    packed = quantize_checkpoint(plain, tmp_path / "packed", 32)
    words = (packed / "model.safetensors").stat().st_size
    assert least_weight_bytes(Checkpoint.open(packed), torch.float32) < words


def test_running_out_of_memory_while_loading_is_told_as_such(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(device_load, "open_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(device_load, "load_model", full)
    with pytest.raises(RunnerConfigError, match=r"device cuda ran out of memory .* allocate 9 GiB"):
        load_device_runner(config_of(plain))


def test_a_cache_wider_than_the_activations_is_refused_before_weights_are_loaded(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_load, "open_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(device_load, "load_model", lambda *_, **__: pytest.fail("loaded"))
    config = RunnerConfig(source=plain, device="cuda", dtype="bfloat16", kv_dtype="float32")
    with pytest.raises(RunnerConfigError, match="float32 is wider than the activations"):
        load_device_runner(config)


def test_the_numerics_id_names_what_splits_the_sums_of_a_fast_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {}
    for processors in (114, 132):
        found = SimpleNamespace(major=9, minor=0, multi_processor_count=processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=found: found)
        for is_deterministic in (False, True):
            numerics = Numerics(torch.bfloat16, is_deterministic, device=torch.device("cuda", 0))
            ids[processors, is_deterministic] = numerics_id(
                numerics, FORMATS["int8"], {"qkv": "w4a16"}, "f00d"
            )
    assert ids[114, False] != ids[132, False]
    assert ids[114, True] == ids[132, True]
    assert ids[132, False].startswith("bfloat16-kvint8-cuda-sm90x132-triton")


def test_a_deterministic_gpu_engine_tries_its_linears_with_as_many_rows_as_a_step_has() -> None:
    """Seen on the CPU through a device that only looks like one."""
    rows = []

    class Row:
        in_features, out_features, path = 4096, 4096, "fixed"

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            rows.append(len(x))
            return x

    for kind in ("cpu", "cuda"):
        numerics = SimpleNamespace(device=SimpleNamespace(type=kind), dtype=torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
            assert _check_linears({"qkv": Row()}, numerics, 2048) is None  # type: ignore[dict-item, arg-type]
    half = len(rows) // 2
    assert (max(rows[:half]), max(rows[half:])) == (128, 2048)


@pytest.mark.parametrize(
    ("head_dim", "fits"), [(64, True), (96, True), (256, True), (20, False), (264, False)]
)
def test_heads_without_kernels_are_refused_before_anything_is_loaded(head_dim: int, fits: bool) -> None:
    if fits:
        return check_head_dim(head_dim)
    with pytest.raises(RunnerConfigError, match=f"head_dim {head_dim} has no kernels"):
        check_head_dim(head_dim)
    return None
