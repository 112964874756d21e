"""The runner on the demo model: bit-equal rows in any batch, refusals, copies, failures that stay in their
row.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.core.batch import BlockCopy, Chunk, SampledToken
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels.numerics import Numerics
from services.engine.models.config import ModelConfig
from services.engine.runner import load, self_test
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from services.engine.runner.inputs import InputError, make_inputs
from services.engine.runner.kv_cache import resolve_num_blocks
from services.engine.runner.model_runner import ModelRunner, load_runner
from services.engine.runner.self_test import SelfTestResult

VOCAB = 4096


class _Blocks:
    """Hands out shuffled blocks of one runner."""

    def __init__(self, runner: ModelRunner, seed: int = 0) -> None:
        self.size = runner.info.block_size
        self.free = list(range(runner.info.num_blocks))
        random.Random(seed).shuffle(self.free)

    def sequence(self, ids: list[int], **params: object) -> Sequence:
        sequence = Sequence(len(self.free), list(ids), SamplingParams(max_tokens=8, **params))  # type: ignore[arg-type]
        sequence.block_table = [self.free.pop() for _ in range(-(-len(ids) // self.size))]
        return sequence


def _ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _prefill(runner: ModelRunner, sequence: Sequence, stop: int, step: int) -> None:
    for start in range(0, stop, step):
        runner.forward([Chunk(sequence, start, min(step, stop - start), False)])


@pytest.fixture(scope="module")
def alone(runners: dict[int, ModelRunner]) -> dict[int, Tensor]:
    """Logits after 64 prompts of different lengths, each computed alone and whole in blocks of 128."""
    runner = runners[128]
    logits = {}
    for index in range(64):
        sequence = _Blocks(runner).sequence(_ids(3 + 5 * index, index))
        logits[index] = runner.forward([Chunk(sequence, 0, len(sequence), True)])[0]
    return logits


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("step", [7, 512])
def test_64_rows_together_have_the_bits_of_each_alone(
    runners: dict[int, ModelRunner], alone: dict[int, Tensor], block_size: int, step: int
) -> None:
    runner = runners[block_size]
    blocks = _Blocks(runner, seed=step)
    members = [blocks.sequence(_ids(3 + 5 * index, index)) for index in range(64)]
    order = list(range(64))
    random.Random(step).shuffle(order)
    for sequence in members[:8]:
        _prefill(runner, sequence, len(sequence) - 1, step)
    for sequence in members[8:]:
        _prefill(runner, sequence, len(sequence) - 1, 512)
    logits = runner.forward([Chunk(members[i], len(members[i]) - 1, 1, True) for i in order])
    for row, index in enumerate(order):
        assert torch.equal(logits[row], alone[index]), f"prompt {index}"


def test_a_mixed_batch_has_the_same_bits(runners: dict[int, ModelRunner], alone: dict[int, Tensor]) -> None:
    runner = runners[16]
    blocks = _Blocks(runner)
    chunks, expected = [], []
    for index in (60, 3, 40, 22, 0, 17):
        sequence = blocks.sequence(_ids(3 + 5 * index, index))
        start = {60: len(sequence) - 1, 40: 50, 22: len(sequence) - 1}.get(index, 0)
        _prefill(runner, sequence, start, 64)
        is_sampling = index != 17
        chunks.append(Chunk(sequence, start, len(sequence) - start, is_sampling))
        if is_sampling:
            expected.append(alone[index])
    assert torch.equal(runner.forward(chunks), torch.stack(expected))


def test_a_shared_and_a_copied_prefix_have_the_same_bits(
    runners: dict[int, ModelRunner], alone: dict[int, Tensor]
) -> None:
    runner = runners[128]
    blocks = _Blocks(runner)
    first = blocks.sequence(_ids(3 + 5 * 50, 50))
    _prefill(runner, first, len(first), 512)
    second = blocks.sequence(first.token_ids)
    second.block_table[0] = first.block_table[0]
    runner.copy_blocks([BlockCopy(first.block_table[1], second.block_table[1], 70)])
    assert torch.equal(runner.forward([Chunk(second, 198, len(second) - 198, True)])[0], alone[50])


def test_a_copy_takes_the_leading_slots_of_all_layers(runners: dict[int, ModelRunner]) -> None:
    data = runners[16].cache.data
    data[:, :, 5] = torch.randn(data[:, :, 5].shape)
    data[:, :, 9] = float("nan")
    runners[16].copy_blocks([BlockCopy(5, 9, 11)])
    assert torch.equal(data[:, :, 9, :, :11], data[:, :, 5, :, :11])
    assert bool(torch.isnan(data[:, :, 9, :, 11:]).all())


def test_padding_rows_touch_no_block_of_a_sequence(runners: dict[int, ModelRunner]) -> None:
    runner = runners[16]
    runner.cache.reset(is_poisoned=True)
    sequence = _Blocks(runner).sequence(_ids(5, 1))
    runner.forward([Chunk(sequence, 0, 5, True)])
    written = torch.isfinite(runner.cache.data).all(-1)[:, :, : runner.info.num_blocks].sum()
    assert int(written) == runner.info.num_layers * 2 * 5 * runner.model.config.num_kv_heads


def test_a_step_that_samples_nothing_gives_no_rows(runners: dict[int, ModelRunner]) -> None:
    runner = runners[16]
    sequence = _Blocks(runner).sequence(_ids(9, 1))
    logits = runner.forward([Chunk(sequence, 0, 4, False)])
    assert logits.shape == (0, VOCAB)
    assert runner.sample(logits, []) == []
    assert runner.forward([]).shape == (0, VOCAB)


@pytest.mark.parametrize(
    ("ids", "table", "start", "length", "text"),
    [
        ([1, 2, VOCAB], [0], 0, 3, "token id"),
        ([1, -1], [0], 0, 2, "token id"),
        ([1] * 17, [0], 0, 17, "do not hold"),
        ([1] * 4, [99999], 0, 4, "block table"),
        ([1] * 4, [-1], 0, 4, "block table"),
        ([1] * 4, [0], 2, 3, "chunk"),
        ([1] * 4, [0], 0, 0, "chunk"),
        ([1] * 1025, list(range(65)), 1024, 1, "positions"),
    ],
)
def test_prepare_refuses_what_would_read_outside(
    runners: dict[int, ModelRunner], ids: list[int], table: list[int], start: int, length: int, text: str
) -> None:
    sequence = Sequence("bad", ids, SamplingParams(max_tokens=1))
    sequence.block_table = table
    with pytest.raises(InputError, match=text):
        runners[16].prepare(Chunk(sequence, start, length, True))


def test_prepare_refuses_parameters_and_forget_forgets(runners: dict[int, ModelRunner]) -> None:
    runner = runners[16]
    blocks = _Blocks(runner)
    with pytest.raises(ValueError, match="temperature"):
        runner.prepare(Chunk(blocks.sequence([1], temperature=float("nan")), 0, 1, True))
    sequence = blocks.sequence([1, 2])
    runner.prepare(Chunk(sequence, 0, 2, True))
    runner.forget(sequence)
    runner.forget(sequence)
    assert runner._sampler.num_states == 0


def test_a_sequence_whose_cache_is_not_finite_fails_alone(runners: dict[int, ModelRunner]) -> None:
    runner = runners[128]
    blocks = _Blocks(runner)
    good, bad = blocks.sequence(_ids(30, 1), temperature=0.0), blocks.sequence(_ids(30, 2), temperature=0.0)
    for sequence in (good, bad):
        _prefill(runner, sequence, 29, 64)
    before = runner.forward([Chunk(good, 29, 1, True)])
    runner.cache.data[2, 0, bad.block_table[0], 0, 3] = float("inf")
    chunks = [Chunk(bad, 29, 1, True), Chunk(good, 29, 1, True)]
    logits = runner.forward(chunks)
    results = runner.sample(logits, chunks)
    assert torch.equal(logits[1], before[0])
    assert isinstance(results[0], Exception)
    assert results[1] == SampledToken(int(before[0].argmax()))


def test_info_says_what_runs(runners: dict[int, ModelRunner]) -> None:
    info = runners[128].info
    assert (info.vocab_size, info.num_blocks, info.block_size, info.max_model_len) == (VOCAB, 192, 128, 1024)
    assert info.kv_bytes_per_token == 2 * 6 * 2 * 64 * 4
    assert (info.bos_token_id, info.eos_token_ids) == (0, (1,))
    assert info.is_deterministic
    assert info.kernel_paths["qkv"] == "int4-dequantize"
    assert info.weight_bytes < 7_000_000
    assert info.numerics_id == runners[16].info.numerics_id
    assert info.tokenizer_digest == ""  # this checkpoint was written without a tokenizer
    assert info.artifact_digest == runners[16].info.artifact_digest
    assert not runners[128].is_device_fault(RuntimeError("any"))


def test_packed_inputs_are_the_chunks_one_after_the_other() -> None:
    first, second = (
        Sequence("a", [5, 6, 7, 8, 9], SamplingParams(max_tokens=1)),
        Sequence("b", [1, 2], SamplingParams(max_tokens=1)),
    )
    first.block_table, second.block_table = [3, 0], [2]
    inputs = make_inputs([Chunk(first, 2, 3, False), Chunk(second, 1, 1, True)], 4, 9, 8)
    assert inputs.token_ids.tolist() == [7, 8, 9, 2, 0, 0, 0, 0]
    assert inputs.metadata.positions.tolist() == [2, 3, 4, 1, 0, 0, 0, 0]
    assert inputs.metadata.slot_mapping.tolist() == [14, 15, 0, 9, 36, 37, 38, 39]
    assert inputs.metadata.block_tables.tolist() == [[3, 0], [2, 2]]
    assert (inputs.logits_rows.tolist(), inputs.num_logits) == ([3] + [0] * 7, 1)


def test_a_machine_that_does_not_hold_its_bits_is_found_out(
    packed_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With linears that see their batch's row count, the self-test must fail at every tile."""
    monkeypatch.setattr("services.engine.kernels.linear.pad_rows", lambda x, tile: x)
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: real(a, b) * (1 + 1e-6 * a.shape[0]))
    settings = {"source": packed_demo, "dtype": "float32", "num_blocks": 8}
    with pytest.raises(RunnerConfigError, match="does not hold on this machine"):
        load_runner(RunnerConfig(**settings, is_deterministic=True))
    assert not load_runner(RunnerConfig(**settings)).info.is_deterministic


def test_the_larger_attention_tile_is_taken_when_the_small_one_fails(
    runners: dict[int, ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runners[16]

    def fail_small(model: object, cache: object, numerics: Numerics, *limits: int) -> SelfTestResult:
        return SelfTestResult("other bits" if numerics.query_tile == 4 else None, "f00d")

    monkeypatch.setattr(self_test, "run_self_test", fail_small)
    config = RunnerConfig(source=Path("x"), is_deterministic=True)
    small = Numerics(torch.float32, is_deterministic=True)
    settled, fingerprint = self_test.settle_numerics(runner.model, runner.cache, small, 1024, config)
    runner.model.use(runner.numerics)
    assert (settled.query_tile, fingerprint) == (16, "f00d")


def _config_of(runner: ModelRunner, **changes: int) -> ModelConfig:
    from dataclasses import replace

    return replace(runner.model.config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_blocks": 7, "kv_memory_bytes": 1}, 7),
        ({"kv_memory_bytes": 11 * 128 * 100 + 5}, 10),
        ({"max_batch_size": 3}, 3 * 8),
        ({"max_batch_size": 10**6}, (1 << 30) // (128 * 100) - 1),
    ],
)
def test_the_cache_is_sized_by_blocks_then_memory_then_batch(settings: dict[str, int], expected: int) -> None:
    config = RunnerConfig(source=Path("x"), **settings)
    assert resolve_num_blocks(config, 100, 1000) == expected


def test_a_context_beyond_the_default_cache_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_num_blocks(RunnerConfig(source=Path("x")), 1 << 20, 131072) == 7
    assert "holds 896 tokens, one sequence 131072" in caplog.text


def test_auto_is_exact_for_small_models_and_fast_for_large_ones(
    runners: dict[int, ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = _config_of(runners[16])
    large = _config_of(runners[16], num_layers=200)
    auto = RunnerConfig(source=Path("x"), has_native_kernels=False)
    told = RunnerConfig(source=Path("x"), has_native_kernels=False, is_deterministic=True)
    assert load.num_layer_weights(small) == 6 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 768)
    assert load.choose_numerics(auto, small) == Numerics(torch.float32, is_deterministic=True)
    monkeypatch.setattr("services.engine.kernels.int4pack.is_supported", lambda *args: True)
    assert load.choose_numerics(auto, large) == Numerics(torch.bfloat16, is_deterministic=False)
    assert load.choose_numerics(told, large) == Numerics(torch.float32, is_deterministic=True)
    monkeypatch.setattr("services.engine.kernels.int4pack.is_supported", lambda *args: False)
    assert load.choose_numerics(auto, large).dtype == torch.float32


@pytest.mark.parametrize("has_native", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_stays_near_float32(
    packed_demo: Path, runners: dict[int, ModelRunner], seed: int, has_native: bool
) -> None:
    config = RunnerConfig(
        source=packed_demo, dtype="bfloat16", num_blocks=8, is_poisoned=True, has_native_kernels=has_native
    )
    fast = load_runner(config)
    assert fast.info.is_deterministic == ("native-int4" in fast.info.kernel_paths.values())
    ids = _ids(200, 100 + seed)
    logits = []
    for runner in (fast, runners[128]):
        sequence = _Blocks(runner).sequence(ids)
        _prefill(runner, sequence, 150, 100)
        rows = [runner.forward([Chunk(sequence, 150, 20, True)])]
        rows += [runner.forward([Chunk(sequence, position, 1, True)]) for position in range(170, 200)]
        logits.append(torch.cat(rows).double().log_softmax(-1))
    divergence = (logits[1].exp() * (logits[1] - logits[0])).sum(-1).mean()
    assert 0 <= float(divergence) < 0.002


def test_a_plain_checkpoint_has_no_version(runners: dict[int, ModelRunner]) -> None:
    """A gateway that is told one would look for it among the artifacts."""
    assert runners[16].info.artifact_version == ""
    assert runners[16].info.artifact_digest.startswith("sha256:")
