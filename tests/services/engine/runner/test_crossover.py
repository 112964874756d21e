"""Packed bf16 products: their layout, their accuracy, and the measured row count that ends their use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from services.engine.application import runner_config
from services.engine.config import load
from services.engine.kernels import int4pack, reference
from services.engine.kernels.int4pack import Int4PackLinear
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch
from services.engine.runner import crossover
from services.engine.runner.model_runner import load_runner

BF16 = Numerics(torch.bfloat16, is_deterministic=False)

if not int4pack.is_supported(256, 128, 64, BF16):
    pytest.skip("no fast packed int4 product on this CPU", allow_module_level=True)


def _linear(
    in_features: int = 256, out_features: int = 192, group: int = 64, *, has_bias: bool = True
) -> Int4PackLinear:
    generator = torch.Generator().manual_seed(in_features)
    values = torch.randint(16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (in_features // group, out_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 1e-3).half()
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    linear = Int4PackLinear(values, zeros, scales, bias, BF16, Scratch())
    linear.expected = reference.dequantize_int4(values, zeros, scales)  # type: ignore[attr-defined]
    return linear


@pytest.mark.parametrize(
    ("in_features", "out_features", "group"), [(256, 192, 64), (96, 64, 32), (512, 1024, 128)]
)
def test_one_copy_serves_both_paths(in_features: int, out_features: int, group: int) -> None:
    linear = _linear(in_features, out_features, group)
    assert torch.equal(linear.dequantize(), linear.expected.bfloat16())  # type: ignore[attr-defined]
    x = torch.randn(9, in_features, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = x.double() @ linear.expected.double() + linear.bias.double()  # type: ignore[attr-defined, union-attr]
    for rows in (None, 1):
        linear.crossover_rows = rows
        error = (linear(x).double() - exact).norm() / exact.norm()
        assert float(error) < 0.01
    assert linear.num_bytes < (0.5 + 9.1 / group) * in_features * out_features


@pytest.mark.parametrize(("rows", "is_dequantized"), [(1, False), (31, False), (32, True), (100, True)])
def test_the_crossover_decides_by_rows(
    rows: int, is_dequantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = _linear()
    linear.crossover_rows = 32
    calls = []
    real = linear.dequantize
    monkeypatch.setattr(linear, "dequantize", lambda: calls.append(1) or real())
    linear(torch.ones(rows, 256, dtype=torch.bfloat16))
    assert bool(calls) is is_dequantized


def test_the_figure_is_where_dequantising_wins_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = _linear()

    def time_of(linear: Int4PackLinear, x: torch.Tensor) -> float:
        rows = x.shape[0]
        return 50.0 if linear.crossover_rows else float(rows) + (100 if rows == 16 else 0)

    monkeypatch.setattr(crossover, "_time", time_of)
    assert crossover.measure_crossover(linear) == 64


def test_the_figure_is_remembered_per_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = _linear()
    figures = iter([48, 96])
    monkeypatch.setattr(crossover, "measure_crossover", lambda linear: next(figures))
    assert crossover.set_crossover([linear], "sha256:a", tmp_path) == 48
    assert crossover.set_crossover([linear], "sha256:a", tmp_path) == 48
    assert crossover.set_crossover([linear], "sha256:b", tmp_path) == 96
    assert linear.crossover_rows == 96
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text())["rows"] in (48, 96)


def test_a_new_host_name_is_no_new_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container has another one at every start."""
    figures = iter([48, 96])
    monkeypatch.setattr(crossover, "measure_crossover", lambda linear: next(figures))
    for name in ("a1b2", "c3d4"):
        monkeypatch.setattr("platform.node", lambda name=name: name)
        assert crossover.set_crossover([_linear()], "sha256:a", tmp_path) == 48


def test_another_processor_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([48, 96])
    monkeypatch.setattr(crossover, "measure_crossover", lambda linear: next(figures))
    assert crossover._processor()
    for name, rows in (("old", 48), ("new", 96), ("old", 48)):
        monkeypatch.setattr(crossover, "_processor", lambda name=name: name)
        assert crossover.set_crossover([_linear()], "sha256:a", tmp_path) == rows


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(crossover, "measure_crossover", lambda linear: 24)
    monkeypatch.setattr("os.replace", full)
    assert crossover.set_crossover([_linear()], "sha256:a", tmp_path) == 24
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_engine_measures_once_per_artifact(
    dtype: str, packed_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(crossover, "measure_crossover", lambda linear: measured.append(1) or 40)
    flags = ["--source", str(packed_demo), "--dtype", dtype, "--num-blocks", "8", "--no-native-kernels"]
    config = load([*flags, "--cache-dir", str(tmp_path / "cache")])
    for _ in range(2):
        info = load_runner(runner_config(config)).info
        assert info.crossover_rows == (40 if dtype == "bfloat16" else None)
    assert len(measured) == len(list(tmp_path.glob("cache/*"))) == (dtype == "bfloat16")


@pytest.mark.parametrize("content", ["", "{}", '{"rows": "many"}', '{"rows": 0}', '{"rows": 1e9}', "[]"])
def test_a_spoilt_file_is_measured_anew(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossover, "measure_crossover", lambda linear: 24)
    crossover.set_crossover([_linear()], "sha256:a", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    assert crossover.set_crossover([_linear()], "sha256:a", tmp_path) == 24


def test_a_directory_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossover, "measure_crossover", lambda linear: 24)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert crossover.set_crossover([_linear()], "sha256:a", blocked) == 24


def test_without_packed_linears_there_is_no_figure() -> None:
    assert crossover.set_crossover([], "sha256:a", None) is None
