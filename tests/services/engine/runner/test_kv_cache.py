"""The cache memory in every format: bytes as planned, poison, copies, and rows that keep their bits and
errors to themselves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.engine.core.batch import BlockCopy, Chunk, SampledToken
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels import reference
from services.engine.kernels.kv_format import FORMATS
from services.engine.models.config import ModelConfig
from services.engine.models.llama import Llama
from services.engine.runner.config import KV_DTYPES, RunnerConfig, RunnerConfigError
from services.engine.runner.kv_cache import (
    KVCache,
    choose_kv_format,
    kv_bytes_per_token,
    resolve_num_blocks,
)
from services.engine.runner.model_runner import ModelRunner, load_runner
from tests.services.engine.models.checkpoints import LLAMA
from weft.memory import DEVICES, KV_BITS, ModelShape, plan

STORED = [name for name in KV_DTYPES if name != "auto"]
QUANTIZED = ["fp8", "int8", "int4"]
VOCAB = 4096


def _config(**changes: int) -> ModelConfig:
    return Llama.parse({**LLAMA, **changes})


def test_what_the_engine_stores_is_what_the_plan_knows() -> None:
    assert set(KV_DTYPES) == set(KV_BITS) == set(FORMATS) | {"auto"}


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 6])
@pytest.mark.parametrize("name", STORED)
def test_bytes_allocated_are_bytes_planned(name: str, head_dim: int, block_size: int) -> None:
    raw = {**LLAMA, "head_dim": head_dim}
    config = Llama.parse(raw)
    planned = plan(
        ModelShape.from_config(raw, "x"), device=DEVICES["h200"], kv_dtype=name, block_size=block_size
    )
    cache = KVCache(config, 3, block_size, FORMATS[name])
    tensors = [cache.data] if cache.params is None else [cache.data, cache.params]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 4 * planned.block_bytes
    assert cache.num_bytes == 4 * planned.block_bytes
    assert kv_bytes_per_token(config, FORMATS[name]) == planned.kv_bytes_per_token
    per_vector = FORMATS[name].bytes_per_vector(head_dim)
    assert planned.kv_bytes_per_token == 2 * config.num_layers * config.num_kv_heads * per_vector


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_memory_given_is_filled_and_never_exceeded(name: str) -> None:
    config, memory = _config(head_dim=80), 1_000_000
    settings = RunnerConfig(source=Path("x"), kv_memory_bytes=memory, kv_dtype=name, block_size=16)
    kv_format = choose_kv_format(settings, config, torch.float32)
    per_token = kv_bytes_per_token(config, kv_format)
    cache = KVCache(config, resolve_num_blocks(settings, per_token, 512), 16, kv_format)
    assert memory - 16 * per_token < cache.num_bytes <= memory


def test_auto_is_the_type_of_the_activations() -> None:
    settings = RunnerConfig(source=Path("x"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose_kv_format(settings, _config(), dtype).storage == dtype


def test_an_odd_head_in_four_bits_is_refused() -> None:
    settings = RunnerConfig(source=Path("x"), kv_dtype="int4")
    with pytest.raises(RunnerConfigError, match="int4 needs an even head_dim, the model has 63"):
        choose_kv_format(settings, replace(_config(), head_dim=63), torch.float32)


def test_a_format_that_there_is_not_is_named() -> None:
    with pytest.raises(RunnerConfigError, match=r"kv_dtype must be one of .*int4, found 'int2'"):
        RunnerConfig(source=Path("x"), kv_dtype="int2")


@pytest.mark.parametrize("name", STORED)
def test_poison_reads_as_nan_and_reset_as_zero(name: str) -> None:
    cache = KVCache(_config(), 2, 16, FORMATS[name], is_poisoned=True)
    blocks = torch.arange(3)
    for layer in cache.layers:
        assert all(bool(part.isnan().all()) for part in reference._read_blocks(layer, blocks))
    cache.reset()
    for layer in cache.layers:
        assert not any(bool(part.any()) for part in reference._read_blocks(layer, blocks))


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_copy_takes_the_scales_along(name: str) -> None:
    cache = KVCache(_config(), 4, 16, FORMATS[name], is_poisoned=True)
    assert cache.params is not None
    cache.data[:, :, 1] = torch.randint(256, cache.data[:, :, 1].shape, dtype=torch.uint8)
    cache.params[:, :, 1] = torch.randint(1 << 30, cache.params[:, :, 1].shape, dtype=torch.int32)
    before = [stored.clone() for stored in (cache.data, cache.params)]
    cache.copy_blocks([BlockCopy(1, 3, 11)])
    for stored, old in zip((cache.data, cache.params), before, strict=True):
        assert torch.equal(stored[:, :, 3, :, :11], old[:, :, 1, :, :11])
        assert torch.equal(stored[:, :, 3, :, 11:], old[:, :, 3, :, 11:])
        assert torch.equal(stored[:, :, :3], old[:, :, :3])


@pytest.fixture(scope="module")
def quantized(packed_demo: Path) -> dict[str, ModelRunner]:
    """Deterministic runners by kv dtype, their unowned memory NaN."""
    return {
        name: load_runner(
            RunnerConfig(
                source=packed_demo,
                dtype="float32",
                kv_dtype=name,
                is_deterministic=True,
                block_size=16,
                num_blocks=200,
                is_poisoned=True,
            )
        )
        for name in QUANTIZED
    }


def _sequence(key: int, length: int, first_block: int) -> Sequence:
    generator = torch.Generator().manual_seed(key)
    ids = torch.randint(VOCAB, (length,), generator=generator).tolist()
    sequence = Sequence(key, ids, SamplingParams(max_tokens=8, temperature=0.0))
    sequence.block_table = list(range(first_block, first_block + -(-length // 16)))
    return sequence


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_runner_says_how_it_stores(quantized: dict[str, ModelRunner], name: str) -> None:
    info = quantized[name].info
    assert info.kv_dtype == name
    assert f"-kv{name}-" in info.numerics_id
    assert info.is_deterministic
    assert info.kv_bytes_per_token == 2 * 6 * 2 * ({"int4": 32}.get(name, 64) + 4)


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_keep_their_bits_and_unowned_memory_does_not_show(
    quantized: dict[str, ModelRunner], name: str
) -> None:
    runner = quantized[name]
    runner.cache.reset(is_poisoned=True)
    alone = _sequence(1, 150, 7)
    expected = runner.forward([Chunk(alone, 0, 150, True)])[0]
    assert bool(expected.isfinite().all())
    others = [_sequence(key, 20 + 30 * key, 20 + 15 * key) for key in range(2, 6)]
    for start in range(0, 149, 30):
        chunks = [Chunk(alone, start, min(30, 149 - start), False)]
        chunks += [Chunk(other, start, 10, True) for other in others if start + 10 < len(other)]
        runner.forward(chunks)
    copied = _sequence(1, 150, 150)
    copied.block_table[:9] = alone.block_table[:9]
    runner.copy_blocks([BlockCopy(alone.block_table[9], copied.block_table[9], 5)])
    rows = runner.forward([Chunk(others[3], 160, 1, True), Chunk(copied, 149, 1, True)])
    assert torch.equal(rows[1], expected)


@pytest.mark.parametrize(("name", "bound"), [("int8", 1e-4), ("fp8", 2e-3), ("int4", 2e-2)])
def test_quantised_logits_stay_near_those_of_full_precision(
    quantized: dict[str, ModelRunner], runners: dict[int, ModelRunner], name: str, bound: float
) -> None:
    logits = []
    for runner in (runners[16], quantized[name]):
        sequence = _sequence(3, 150, 0)
        rows = [runner.forward([Chunk(sequence, 0, 100, True)])]
        rows += [runner.forward([Chunk(sequence, position, 1, True)]) for position in range(100, 150)]
        logits.append(torch.cat(rows).double().log_softmax(-1))
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert bound / 1000 < float(divergence) < bound


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_vector_that_is_not_finite_ends_its_sequence_alone(
    quantized: dict[str, ModelRunner], name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = quantized[name]
    good, bad = _sequence(1, 30, 0), _sequence(2, 30, 10)
    runner.forward([Chunk(good, 0, 29, False), Chunk(bad, 0, 29, False)])
    before = runner.forward([Chunk(good, 29, 1, True)])
    real = reference.quantize

    def with_one_bad_key(x: torch.Tensor, kv_format: object) -> object:
        x = x.clone()
        x[0, 3] = value  # the first row is that of `bad`
        return real(x, kv_format)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "quantize", with_one_bad_key)
    chunks = [Chunk(bad, 29, 1, True), Chunk(good, 29, 1, True)]
    logits = runner.forward(chunks)
    results = runner.sample(logits, chunks)
    assert torch.equal(logits[1], before[0])
    assert isinstance(results[0], Exception)
    assert results[1] == SampledToken(int(before[0].argmax()))
