"""The whole model on the GPU's backend against the CPU's: prefill in chunks, decodes, both in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.kernels import ops
from services.engine.kernels.gpu.backend import GpuBackend
from services.engine.kernels.gpu.gpu_metadata import PLAN_KEY, GpuMetadata, gpu_metadata
from services.engine.kernels.kv_format import FORMATS
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.models.llama import Llama
from services.engine.models.loader import load_model, read_model_config
from services.engine.runner.kv_cache import KVCache
from tests.services.engine.models.checkpoints import LLAMA, QWEN3, quantize_checkpoint, write_checkpoint
from weft.artifact.checkpoint import Checkpoint

BLOCK_SIZE = 16
NUM_BLOCKS = 12
TABLES = {"a": [3, 7, 0, 9], "b": [11, 2, 5], "c": [4, 1, 8, 6]}
TOKENS = torch.randint(0, 97, (3, 64), generator=torch.Generator().manual_seed(0))
STEPS = [
    {"a": (0, 19), "b": (0, 5)},
    {"a": (19, 21), "b": (5, 6), "c": (0, 34)},
    {"a": (21, 22), "b": (6, 7), "c": (34, 35)},
    {"c": (35, 36), "b": (7, 8)},
]
"""[first, last) positions of each sequence: two prefills, a mixture, two steps of decodes."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in groups of 32, and a Qwen3, whose heads are normed, unquantised."""
    place = tmp_path_factory.mktemp("models")
    plain = write_checkpoint(place / "plain", LLAMA)
    return {
        "llama-int4": quantize_checkpoint(plain, place / "packed", 32),
        "qwen3": write_checkpoint(place / "qwen3", QWEN3),
    }


class Engine:
    """A model on one backend, with its cache. Unwritten memory is NaN."""

    def __init__(self, directory: Path, kv_dtype: str, numerics: Numerics) -> None:
        checkpoint = Checkpoint.open(directory)
        config = read_model_config(checkpoint)
        self.device = numerics.device
        self.model: Llama = load_model(checkpoint, config, numerics, 64)
        self.cache = KVCache(
            config, NUM_BLOCKS, BLOCK_SIZE, FORMATS[kv_dtype], device=str(self.device), is_poisoned=True
        )

    def step(self, spans: dict[str, tuple[int, int]], num_padding: int = 0) -> Tensor:
        """Logits [rows, vocab] of every row of a batch."""
        positions = [position for span in spans.values() for position in range(*span)]
        owners = [name for name, span in spans.items() for _ in range(*span)]
        ids = [int(TOKENS["abc".index(name), p]) for name, p in zip(owners, positions, strict=True)]
        slots = [
            TABLES[name][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for name, p in zip(owners, positions, strict=True)
        ]
        width = max(map(len, TABLES.values()))
        # What follows a table's end is a block that must not be read.
        tables = [TABLES[name] + [NUM_BLOCKS] * (width - len(TABLES[name])) for name in spans]
        metadata = AttentionMetadata(
            self._tensor(positions + [0] * num_padding),
            self._tensor(slots + [NUM_BLOCKS * BLOCK_SIZE] * num_padding),
            self._tensor(tables),
            [end - start for start, end in spans.values()],
            [end for _, end in spans.values()],
            BLOCK_SIZE,
            num_padding,
        )
        rows = self._tensor(list(range(len(ids))))
        with torch.inference_mode():
            logits = self.model.forward(
                self._tensor(ids + [0] * num_padding), metadata, self.cache.layers, rows
            )
        return logits.cpu()

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.device)


@pytest.fixture
def gpu_backend(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors go to the GPU's backend where there is no GPU."""
    if device == "cpu":
        monkeypatch.setitem(ops._BACKENDS, "cpu", GpuBackend)
    return


def _gpu_engine(directory: Path, kv_dtype: str, device: str, **options: Any) -> Engine:
    numerics = Numerics(torch.float32, options.pop("is_deterministic", False), device=torch.device(device))
    return Engine(directory, kv_dtype, numerics)


def _expected(directory: Path, kv_dtype: str) -> tuple[list[Tensor], KVCache]:
    """Logits of all steps on the CPU's backend, and the cache after them."""
    engine = Engine(directory, kv_dtype, Numerics(torch.float32, is_deterministic=False))
    return [engine.step(spans) for spans in STEPS], engine.cache


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [("llama-int4", kv) for kv in ("float32", "int8", "int4", "fp8")]
    + [("qwen3", "float32"), ("qwen3", "int8")],
)
def test_logits_are_those_of_the_cpu(
    name: str, kv_dtype: str, checkpoints: dict[str, Path], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_cache = _expected(checkpoints[name], kv_dtype)
    if device == "cpu":
        monkeypatch.setitem(ops._BACKENDS, "cpu", GpuBackend)
    engine = _gpu_engine(checkpoints[name], kv_dtype, device)
    actual = [engine.step(spans) for spans in STEPS]
    written = [slot for name in TABLES for slot in _slots(name)]
    changed = _share_of_other_codes(engine.cache, expected_cache, written)
    # A sum in another order may move a value over the edge between two codes. That is rare, and small.
    assert changed < 1e-3
    for step, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(step, wanted, rtol=0, atol=1e-4 if changed == 0.0 else 0.1)


def _slots(name: str) -> list[int]:
    length = max(spans[name][1] for spans in STEPS if name in spans)
    return [TABLES[name][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]


def _share_of_other_codes(ours: KVCache, theirs: KVCache, slots: list[int]) -> float:
    """How many codes of the written slots differ; 0 for a cache that is not quantised."""
    if not ours.kv_format.is_quantized:
        return 0.0
    codes = [cache.data.cpu().transpose(3, 4).flatten(2, 3)[:, :, slots] for cache in (ours, theirs)]
    return float((codes[0] != codes[1]).float().mean())


def test_a_row_alone_has_the_bits_it_has_in_a_batch(
    checkpoints: dict[str, Path], device: str, gpu_backend: None
) -> None:
    together = _gpu_engine(checkpoints["llama-int4"], "int8", device, is_deterministic=True)
    batches = [together.step(spans) for spans in STEPS]
    for name in TABLES:
        alone = _gpu_engine(checkpoints["llama-int4"], "int8", device, is_deterministic=True)
        for spans, batch in zip(STEPS, batches, strict=True):
            if name not in spans:
                continue
            first = sum(end - start for start, end in list(spans.values())[: list(spans).index(name)])
            start, end = spans[name]
            assert torch.equal(alone.step({name: (start, end)}), batch[first : first + end - start]), name


def test_chunks_do_not_change_a_row(checkpoints: dict[str, Path], device: str, gpu_backend: None) -> None:
    directory = checkpoints["llama-int4"]
    whole = _gpu_engine(directory, "int8", device, is_deterministic=True).step({"a": (0, 22)})
    engine = _gpu_engine(directory, "int8", device, is_deterministic=True)
    parts = [engine.step({"a": span}) for span in ((0, 7), (7, 8), (8, 21), (21, 22))]
    assert torch.equal(torch.cat(parts), whole)


def test_padding_rows_change_nothing(checkpoints: dict[str, Path], device: str, gpu_backend: None) -> None:
    engines = [_gpu_engine(checkpoints["llama-int4"], "int8", device) for _ in range(2)]
    for spans in STEPS[:3]:
        plain, padded = engines[0].step(spans), engines[1].step(spans, num_padding=3)
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-5)


def test_metadata_of_the_runner_is_taken_as_it_is(device: str) -> None:
    given = GpuMetadata(*(torch.zeros(2, dtype=torch.int32, device=device),) * 3, 1, 16)
    metadata = AttentionMetadata(
        *(torch.zeros(1, dtype=torch.int64),) * 3, [], [], 16, plan={PLAN_KEY: given}
    )
    assert gpu_metadata(metadata) is given


def test_metadata_is_derived_once(device: str) -> None:
    positions = torch.arange(4, device=device)
    tables = torch.tensor([[5, 1], [2, 0]], device=device)
    metadata = AttentionMetadata(positions, positions, tables, [3, 1], [20, 1], 16)
    derived = gpu_metadata(metadata)
    assert derived.query_starts.tolist() == [0, 3, 4]
    assert derived.context_lens.tolist() == [20, 1]
    assert derived.block_tables.tolist() == tables.tolist()
    for tensor in (derived.query_starts, derived.context_lens, derived.block_tables):
        assert tensor.dtype == torch.int32
        assert tensor.device.type == device
        assert tensor.data_ptr() % 16 == 0
    assert (derived.max_query_len, derived.max_context, derived.is_decode) == (3, 20, False)
    assert gpu_metadata(metadata) is derived
