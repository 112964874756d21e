"""The whole model on the GPU's backend against the CPU's: prefill in chunks, decodes, both in one batch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.kernels import ops, reference
from services.engine.kernels.gpu import backend
from services.engine.kernels.gpu.backend import GpuBackend
from services.engine.kernels.gpu.gpu_metadata import PLAN_KEY, GpuMetadata, gpu_metadata
from services.engine.kernels.kv_format import FORMATS, LayerCache
from services.engine.kernels.metadata import AttentionMetadata
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch
from services.engine.models.llama import Llama
from services.engine.models.loader import load_model, read_model_config
from services.engine.models.registry import ARCHITECTURES
from services.engine.runner.kv_cache import KVCache
from tests.services.engine.models.checkpoints import (
    GEMMA2,
    GEMMA3,
    INTERNLM2,
    LLAMA,
    PHI3,
    QWEN3,
    quantize_checkpoint,
    write_checkpoint,
)
from weft.artifact.checkpoint import Checkpoint

BLOCK_SIZE = 16
NUM_BLOCKS = 12
TABLES = {"a": [3, 7], "b": [11], "c": [4]}
TOKENS = torch.randint(0, 97, (3, 64), generator=torch.Generator().manual_seed(0))
STEPS = [
    {"a": (0, 14), "b": (0, 3)},
    {"a": (14, 18), "b": (3, 4), "c": (0, 5)},
    {"a": (18, 19), "b": (4, 5), "c": (5, 6)},
    {"c": (6, 7), "b": (5, 6)},
]
"""[first, last) positions of each sequence: two prefills, a mixture, two steps of decodes."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in groups of 32, its first layer alone, and that of a Qwen3: heads normed, unquantised."""
    place = tmp_path_factory.mktemp("models")
    plain = write_checkpoint(place / "plain", LLAMA)
    shallow = write_checkpoint(place / "shallow", {**LLAMA, "num_hidden_layers": 1})
    gemma2 = write_checkpoint(place / "plain-gemma2", {**GEMMA2, "num_hidden_layers": 1, "sliding_window": 9})
    phi3 = {**PHI3, "num_hidden_layers": 1, "partial_rotary_factor": 0.75, "sliding_window": 9}
    return {
        "llama-int4": quantize_checkpoint(plain, place / "packed", 32),
        "one-layer-int4": quantize_checkpoint(shallow, place / "packed-shallow", 32),
        "qwen3": write_checkpoint(place / "qwen3", {**QWEN3, "num_hidden_layers": 1}),
        "gemma2-int4": quantize_checkpoint(gemma2, place / "gemma2", 32),
        "gemma3": write_checkpoint(
            place / "gemma3", {**GEMMA3, "num_hidden_layers": 2, "sliding_window_pattern": 2}
        ),
        "internlm2-int4": quantize_checkpoint(
            write_checkpoint(place / "plain-internlm2", {**INTERNLM2, "num_hidden_layers": 1}),
            place / "internlm2",
            32,
        ),
        "phi3-int4": quantize_checkpoint(write_checkpoint(place / "plain-phi3", phi3), place / "phi3", 32),
    }


class Engine:
    """A model on one backend, with its cache. Unwritten memory is NaN."""

    def __init__(self, directory: Path, kv_dtype: str, numerics: Numerics) -> None:
        checkpoint = Checkpoint.open(directory, ARCHITECTURES)
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


def _gpu_engine(directory: Path, kv_dtype: str, device: str, **options: Any) -> Engine:
    numerics = Numerics(torch.float32, options.pop("is_deterministic", False), device=torch.device(device))
    return Engine(directory, kv_dtype, numerics)


def _expected(directory: Path, kv_dtype: str) -> tuple[list[Tensor], KVCache]:
    """Logits of all steps on the CPU's backend, and the cache after them."""
    engine = Engine(directory, kv_dtype, Numerics(torch.float32, is_deterministic=False))
    return [engine.step(spans) for spans in STEPS], engine.cache


@pytest.mark.parametrize(
    ("name", "kv_dtype", "num_padding"),
    [
        ("one-layer-int4", "float32", 0),
        ("llama-int4", "int8", 3),
        ("one-layer-int4", "int4", 0),
        ("one-layer-int4", "fp8", 0),
        ("qwen3", "int8", 0),
        ("gemma2-int4", "float32", 0),
        ("gemma2-int4", "int8", 0),
        ("gemma3", "float32", 0),
        ("internlm2-int4", "float32", 0),
        ("phi3-int4", "int8", 0),
    ],
)
def test_logits_are_those_of_the_cpu(
    name: str,
    kv_dtype: str,
    num_padding: int,
    checkpoints: dict[str, Path],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, expected_cache = _expected(checkpoints[name], kv_dtype)
    if device == "cpu":
        monkeypatch.setitem(ops._BACKENDS, "cpu", GpuBackend)
    engine = _gpu_engine(checkpoints[name], kv_dtype, device)
    actual = [engine.step(spans, num_padding) for spans in STEPS]
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


def test_a_row_has_the_same_bits_in_every_batch_and_chunk(
    checkpoints: dict[str, Path], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setitem(ops._BACKENDS, "cpu", GpuBackend)
    directory = checkpoints["one-layer-int4"]
    together = _gpu_engine(directory, "int8", device, is_deterministic=True)
    assert all(linear.path.endswith("-fixed") for linear in together.model.linears.values())
    assert together.model.layers[0].mlp.gate_up.packed.is_interleaved
    rows: dict[str, list[Tensor]] = {name: [] for name in TABLES}
    for spans in STEPS:
        parts = together.step(spans).split([end - start for start, end in spans.values()])
        for name, part in zip(spans, parts, strict=True):
            rows[name].append(part)
    for name, parts in rows.items():
        alone = _gpu_engine(directory, "int8", device, is_deterministic=True)
        end = sum(map(len, parts))
        cuts = [0, 4, 5, end]
        chunks = [alone.step({name: span}) for span in pairwise(cuts)]
        assert torch.equal(torch.cat(chunks), torch.cat(parts)), name


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_decodes_of_a_captured_shape(is_deterministic: bool, device: str, poison_empty: None) -> None:
    """More sequences, a wider table and a longer bound than the batch has, as in a CUDA graph."""
    generator = torch.Generator().manual_seed(2)
    k, v = torch.randn(2, 5, 2, BLOCK_SIZE, 16, generator=generator)
    k[4], v[4] = float("nan"), float("nan")
    cache = LayerCache(FORMATS["float32"], k.to(device), v.to(device))
    query = torch.randn(4, 4, 16, generator=generator).to(device)
    tables, contexts = [[2, 0], [3, 4]], [19, 16]
    slots = torch.zeros(4, dtype=torch.int64)
    exact = AttentionMetadata(torch.tensor([18, 15]), slots[:2], torch.tensor(tables), [1, 1], contexts, 16)
    expected = reference.paged_attention(query[:2].cpu(), LayerCache(cache.kv_format, k, v), exact, 0.25)

    def int32(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    wide = [[*table, 4, 4] for table in tables] + [[4] * 4] * 2
    plan = GpuMetadata(int32([0, 1, 2, 2, 2]), int32([*contexts, 0, 0]), int32(wide), 1, 64)
    metadata = AttentionMetadata(slots, slots.to(device), int32(wide), [], [], 16, 4, {PLAN_KEY: plan})
    numerics = Numerics(torch.float32, is_deterministic, device=torch.device(device))
    actual = GpuBackend.paged_attention(query, cache, metadata, 0.25, numerics, Scratch()).cpu()
    torch.testing.assert_close(actual[:2], expected, rtol=0, atol=1e-5)
    assert torch.equal(actual[2:], torch.zeros(2, 4, 16))
    # The same batch as a runner without graphs pads it: rows behind the last sequence.
    padded = AttentionMetadata(
        slots, slots.to(device), torch.tensor(tables, device=device), [1, 1], contexts, 16, 2
    )
    again = GpuBackend.paged_attention(query, cache, padded, 0.25, numerics, Scratch()).cpu()
    assert torch.equal(again, actual)


def test_a_deterministic_engine_has_one_attention(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "paged_prefill", lambda *_, **options: options["deterministic"])
    monkeypatch.setattr(backend, "_decode", lambda *_: "decode")
    cpu = torch.zeros(2, dtype=torch.int64)
    found = []
    for lengths in ([1, 1], [2]):
        metadata = AttentionMetadata(cpu, cpu, cpu[:, None], lengths, [3] * len(lengths), 16)
        for is_deterministic in (False, True):
            numerics = Numerics(torch.float32, is_deterministic)
            found.append(GpuBackend.paged_attention(cpu, None, metadata, 1.0, numerics, None))
    assert found == ["decode", True, False, True]


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
