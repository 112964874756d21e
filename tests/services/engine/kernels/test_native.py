"""The native kernels against their plain twins: odd shapes, poisoned memory, a row's bits in every batch, and
what becomes of an engine without a compiler.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.kernels import int4pack, native, native_layer, native_linear, ops, reference
from services.engine.kernels.kv_format import FORMATS, LayerCache
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

BF16 = Numerics(torch.bfloat16, is_deterministic=False)
ROWS = (1, 2, 3, 4, 5, 7, 17, 66)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = native.library(tmp_path_factory.mktemp("native"))
    if found is None:
        pytest.skip("no compiler, or a processor without AVX-512 BF16")
    return found


@pytest.fixture
def in_use(library: ctypes.CDLL) -> Iterator[None]:
    native.use(library)
    yield
    native.use(None)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _int4(in_features: int, out_features: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(in_features)
    values = torch.randint(16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (in_features // group, out_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 1e-3).half()
    return values, zeros, scales


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("in_features", "out_features", "group"),
    [(8, 8, 8), (64, 24, 32), (256, 200, 64), (272, 72, 136), (120, 129, 24), (512, 1024, 128), (96, 40, 96)],
)
def test_int4_linear(in_features: int, out_features: int, group: int, in_use: None) -> None:
    values, zeros, scales = _int4(in_features, out_features, group)
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(1))
    linear = ops.make_int4_linear(values, zeros, scales, bias, BF16, Scratch())
    assert linear.path == "native-int4"
    x = _normal(max(ROWS), in_features)
    exact = x.double() @ reference.dequantize_int4(values, zeros, scales).double() + bias.double()
    whole = linear(x)
    # One rounding to bf16 at the end and nothing before it: half a unit in the last place, of 8 bits.
    assert bool(((whole.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all())
    for rows in ROWS:
        assert torch.equal(linear(x[:rows]), whole[:rows]), f"{rows} rows"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear(x[order]), whole[order])


@pytest.mark.parametrize(
    ("in_features", "out_features", "group"), [(64, 24, 32), (256, 200, 64), (120, 129, 24)]
)
def test_int8_linear(in_features: int, out_features: int, group: int, in_use: None) -> None:
    weight, x = _normal(out_features, in_features), _normal(max(ROWS), in_features, seed=1)
    linear = native_linear.make_int8(weight, group, None)
    codes, scales = native_linear.quantize_int8(weight, group)
    exact = x.double() @ (codes.double() * scales.double().unsqueeze(-1)).flatten(1).t()
    whole = linear(x)
    assert bool(((whole.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all())
    assert _error(whole, x.double() @ weight.double().t()) < 0.01
    for rows in ROWS:
        assert torch.equal(linear(x[:rows]), whole[:rows])


@pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (264, 129), (256, 200)])
def test_dense_linear(in_features: int, out_features: int, in_use: None) -> None:
    weight, x = _normal(out_features, in_features), _normal(max(ROWS), in_features, seed=1)
    bias = _normal(out_features, seed=2)
    linear = native_linear.make_dense(weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    whole = linear(x)
    assert bool(((whole.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-3).all())
    for rows in ROWS:
        assert torch.equal(linear(x[:rows]), whole[:rows])


def test_a_row_of_nan_and_infinity_stays_alone(in_use: None) -> None:
    linear = ops.make_int4_linear(*_int4(256, 200, 64), None, BF16, Scratch())
    x = _normal(9, 256)
    clean = linear(x)
    x[3, 100], x[5, 7] = float("nan"), float("inf")
    spoilt = linear(x)
    assert bool(spoilt[3].isnan().all())
    assert not bool(spoilt[5].isfinite().any())
    others = torch.tensor([0, 1, 2, 4, 6, 7, 8])
    assert torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int, in_use: None) -> None:
    linear = ops.make_int4_linear(*_int4(256, 1000, 64), None, BF16, Scratch())
    x, before = _normal(21, 256), torch.get_num_threads()
    expected = linear(x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(linear(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 2048), (9, 5632)])
def test_norms(rows: int, width: int, weight_dtype: torch.dtype, in_use: None) -> None:
    x, residual = _normal(rows, width), _normal(rows, width, seed=1)
    weight = _normal(width, seed=2).to(weight_dtype)
    before = x.clone(), residual.clone()
    expected, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    found = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(found[1], total)
    assert _error(found[0], expected) < 2e-3
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    assert _error(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)) < 2e-3
    for row in range(rows):
        assert torch.equal(
            ops.rms_norm(x[row : row + 1], weight, 1e-5), ops.rms_norm(x, weight, 1e-5)[row : row + 1]
        )


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 5632)])
def test_silu_mul(rows: int, width: int, in_use: None) -> None:
    gate_up = _normal(rows, 2 * width) * 8
    gate_up[0, :6] = torch.tensor([-200.0, -88.0, 0.0, 88.0, 200.0, -3e38]).bfloat16()
    expected = reference.silu_mul(gate_up.float())
    found = ops.silu_mul(gate_up).float()
    assert bool(((found - expected).abs() <= expected.abs() * 2**-8 + 1e-30).all())
    gate_up[0, 3] = float("nan")
    assert bool(ops.silu_mul(gate_up)[0, 3].isnan())


def _batch(lengths: list[int], contexts: list[int], block_size: int, padding: int = 0) -> AttentionMetadata:
    """Block tables that run backwards through the cache."""
    blocks = [-(-context // block_size) for context in contexts]
    free = list(range(sum(blocks) + 3))[::-1]
    tables = [[free.pop() for _ in range(count)] for count in blocks]
    positions, slots = [], []
    for table, length, context in zip(tables, lengths, contexts, strict=True):
        for position in range(context - length, context):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
    scratch = (sum(blocks) + 3) * block_size
    return AttentionMetadata(
        torch.tensor(positions + [0] * padding),
        torch.tensor(slots + [scratch + row for row in range(padding)]),
        torch.tensor([table + [table[-1]] * (max(blocks) - len(table)) for table in tables]),
        lengths,
        contexts,
        block_size,
        padding,
    )


def _cache(metadata: AttentionMetadata, kv_heads: int, dim: int) -> LayerCache:
    """Random K and V where a sequence owns a slot, NaN everywhere else."""
    num_blocks = sum(-(-context // metadata.block_size) for context in metadata.context_lens) + 4
    shape = (num_blocks, kv_heads, metadata.block_size, dim)
    k, v = torch.full(shape, float("nan")).bfloat16(), torch.full(shape, float("nan")).bfloat16()
    for index, context in enumerate(metadata.context_lens):
        for position in range(context):
            block = int(metadata.block_tables[index, position // metadata.block_size])
            for stored, seed in ((k, 1), (v, 2)):
                stored[block, :, position % metadata.block_size] = _normal(
                    kv_heads, dim, seed=seed + 10 * position + 10000 * index
                )
    return LayerCache(FORMATS["bfloat16"], k, v)


@pytest.mark.parametrize("window", [None, 20, 70])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(8, 2, 64, 16), (4, 4, 128, 32), (9, 3, 32, 128), (6, 1, 96, 64)],
)
def test_attention(
    heads: int, kv_heads: int, dim: int, block_size: int, window: int | None, in_use: None
) -> None:
    lengths, contexts = [1, 37, 1, 5, 1], [1, 37, 130, 68, 64]
    metadata = _batch(lengths, contexts, block_size, padding=3)
    cache = _cache(metadata, kv_heads, dim)
    query = _normal(sum(lengths) + 3, heads, dim)
    wide = LayerCache(FORMATS["float32"], cache.k.float(), cache.v.float())
    expected = reference.paged_attention(query.float(), wide, metadata, dim**-0.5, sliding_window=window)

    def attend(rows: Tensor, shape: AttentionMetadata) -> Tensor:
        return ops.paged_attention(rows, cache, shape, dim**-0.5, BF16, Scratch(), sliding_window=window)

    found = attend(query, metadata)
    assert "native" in metadata.plan
    assert bool(found.isfinite().all())
    assert bool((found[-3:] == 0).all())
    assert _error(found, expected) < 5e-3
    starts = metadata.query_starts
    for index, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        for row in range(length):  # alone, and as the last row of its sequence
            alone = AttentionMetadata(
                metadata.positions[:1],
                metadata.slot_mapping[:1],
                metadata.block_tables[index : index + 1],
                [1],
                [context - length + row + 1],
                block_size,
            )
            at = starts[index] + row
            assert torch.equal(attend(query[at : at + 1], alone)[0], found[at]), (index, row)


def test_nan_of_a_sequences_own_shows(in_use: None) -> None:
    metadata = _batch([1, 1], [70, 70], 16)
    cache = _cache(metadata, 2, 64)
    query = _normal(2, 4, 64)
    query[1, 2, 5] = float("nan")
    found = ops.paged_attention(query, cache, metadata, 0.1, BF16, Scratch())
    assert bool(found[1, 2].isnan().all())
    assert bool(found[0].isfinite().all())
    cache.k[metadata.block_tables[0, 1], 0, 3] = float("nan")
    found = ops.paged_attention(query, cache, metadata, 0.1, BF16, Scratch())
    assert bool(found[0, :2].isnan().all())


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (3, 3, 32), (4, 1, 128)])
def test_rotary_write_kv(heads: int, kv_heads: int, dim: int, in_use: None) -> None:
    metadata = _batch([3, 1, 40], [50, 9, 40], 16)
    qkv = _normal(44, heads + 2 * kv_heads, dim)
    angles = torch.rand(44, dim // 2, generator=torch.Generator().manual_seed(3)) * 100
    caches = []
    for function in (reference.rotary_write_kv, native_layer.rotary_write_kv):
        cache = _cache(metadata, kv_heads, dim)
        query = function(qkv, angles.cos(), angles.sin(), heads, cache, metadata)
        caches.append((query, cache.k, cache.v))
    for found, expected in zip(caches[1], caches[0], strict=True):
        assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-6, equal_nan=True)
    assert torch.equal(caches[0][2].nan_to_num(9.0), caches[1][2].nan_to_num(9.0))


def test_other_dtypes_and_shapes_go_to_torch(in_use: None) -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    odd = _normal(3, 34)
    assert torch.equal(ops.silu_mul(odd), reference.silu_mul(odd))
    linear = ops.make_int4_linear(*_int4(24, 8, 12), None, BF16, Scratch())
    assert linear.path == "int4-dequantize"
    fp32 = ops.make_int4_linear(*_int4(256, 64, 64), None, Numerics(torch.float32, True), Scratch())
    assert fp32.path == "int4-dequantize"


def test_nothing_changes_until_it_is_used(library: ctypes.CDLL) -> None:
    native.use(None)
    linear = ops.make_int4_linear(*_int4(256, 64, 64), None, BF16, Scratch())
    has_pack = int4pack.is_supported(256, 64, 64, BF16)
    assert linear.path == ("int4pack" if has_pack else "int4-dequantize")


def test_no_compiler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_processor_flags", lambda: native._FEATURES)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with caplog.at_level(logging.INFO):
        assert native.library(tmp_path / "none") is None
    assert [record.getMessage() for record in caplog.records] == [
        "no native kernels, torch's are used: no C compiler (gcc, cc) is installed"
    ]


def test_a_compiler_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "gcc"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit\n"
        "printf 'In file included from layer.c:9:\\nweft_cpu.h:6:10: fatal error: no omp.h\\n' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "_processor_flags", lambda: native._FEATURES)
    monkeypatch.setattr("shutil.which", lambda name: str(compiler))
    with caplog.at_level(logging.INFO):
        assert native.library(tmp_path / "bad") is None
    *_, last = (record.getMessage() for record in caplog.records)
    reason = f"{compiler} failed: weft_cpu.h:6:10: fatal error: no omp.h"
    assert last == f"no native kernels, torch's are used: {reason}"


def test_a_processor_without_the_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_processor_flags", lambda: frozenset({"avx512f"}))
    assert native.library(tmp_path / "old") is None


def test_compiled_once(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native._kept(tmp_path, native._Compiler())
    first = list(tmp_path.iterdir())
    assert len(first) == 1
    monkeypatch.setattr(native._Compiler, "compile", lambda *args: pytest.fail("compiled again"))
    native._kept(tmp_path, native._Compiler())
    assert list(tmp_path.iterdir()) == first


@pytest.fixture(scope="module")
def compiled(library: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native._Compiler().compile(tmp_path_factory.mktemp("compiled"))


def _copy(compiled: Path, folder: Path, size: int | None = None) -> Path:
    path = folder / compiled.name
    path.write_bytes(compiled.read_bytes()[:size])
    path.chmod(0o700)
    return path


@pytest.mark.parametrize("size", [0, 5000])
def test_a_damaged_file_is_compiled_anew(
    size: int, compiled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _copy(compiled, tmp_path, size)
    native._kept(tmp_path, native._Compiler())
    assert "is damaged and compiled anew" in caplog.text
    (left,) = tmp_path.iterdir()
    assert left.stat().st_size == compiled.stat().st_size
    assert path.name.rpartition("-")[0] == left.name.rpartition("-")[0]


def _open_the_folder(path: Path) -> None:
    path.parent.chmod(0o777)


def _open_the_file(path: Path) -> None:
    path.chmod(0o777)


def _link_to_it(path: Path) -> None:
    path.symlink_to(path.rename(path.parent / "elsewhere"))


def _give_the_folder_away(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can")
    os.chown(path.parent, 12345, -1)


@pytest.mark.parametrize("spoil", [_open_the_folder, _open_the_file, _link_to_it, _give_the_folder_away])
def test_no_code_is_run_that_others_could_have_written(
    spoil: Callable[[Path], None],
    compiled: Path,
    library: ctypes.CDLL,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    spoil(_copy(compiled, folder))
    opened: list[Path] = []
    monkeypatch.setattr(native._Compiler, "compile", lambda compiler, into: _copy(compiled, into))
    monkeypatch.setattr(native, "_declared", lambda path: opened.append(path) or library)
    assert native.library(folder) is library
    assert len(opened) == 1
    assert not opened[0].is_relative_to(folder)
    assert "others may write" in caplog.text


def test_a_folder_that_runs_no_code_is_not_the_end(
    compiled: Path, library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dlopen(path: Path) -> ctypes.CDLL:
        if path.is_relative_to(tmp_path):
            raise OSError(f"{path}: failed to map segment from shared object")
        return library

    _copy(compiled, tmp_path)
    monkeypatch.setattr(native._Compiler, "compile", lambda compiler, into: _copy(compiled, into))
    monkeypatch.setattr(native, "_declared", dlopen)
    assert native.library(tmp_path) is library


def test_the_current_folder_will_do(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert native.library(Path()) is not None
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_two_threads_do_not_share_buffers(in_use: None) -> None:
    """A call into C lets other threads run."""
    inputs = [_normal(64, 512, seed=seed) for seed in (1, 2)]
    linear = ops.make_int4_linear(*_int4(512, 1024, 128), None, BF16, Scratch())
    expected = [linear(x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            assert all(map(torch.equal, pool.map(linear, inputs), expected))


def test_rounding_a_head_leaves_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_linear, "_QUANTIZED_AT_ONCE", 7)
    weight = _normal(20, 64).float()
    before = weight.clone()
    codes, scales = native_linear.quantize_int8(weight, 32)
    assert torch.equal(weight, before)
    assert bool((codes.abs().amax(-1) == 127).all())
    assert (
        float((codes * scales.unsqueeze(-1) - before.view(20, 2, 32)).abs().max())
        <= float(scales.max()) * 0.51
    )
