"""The accelerator's runner: the tokens of the plain runner, with steps in flight and with padded graphs.

On a CPU its kernels run in Triton's interpreter, and a graph is a function that is called again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.batch import BlockCopy, Chunk, SampledToken
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels import ops
from services.engine.kernels.gpu.backend import GpuBackend
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from services.engine.runner.device_load import load_device_runner, open_device
from services.engine.runner.device_runner import DeviceRunner, is_device_fault
from services.engine.runner.model_runner import ModelRunner, load_runner
from services.engine.runner.step_graphs import StepGraphs
from services.engine.runner.step_inputs import StepShape
from tests.services.engine.models.checkpoints import LLAMA, quantize_checkpoint, write_checkpoint

BLOCK_SIZE, NUM_BLOCKS = 16, 12
PROMPTS = {"a": [5, 9, 33, 71, 2, 60], "b": [44], "c": [8, 8, 90, 17, 3, 25, 31, 77, 12]}
PARAMS: dict[str, dict[str, Any]] = {
    "a": {"temperature": 0.0},
    "b": {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
    "c": {"temperature": 1.1, "seed": 2**63 + 5, "logprobs": 3, "min_tokens": 4, "logit_bias": ((11, 4.0),)},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of one layer, in groups of 32."""
    place = tmp_path_factory.mktemp("model")
    plain = write_checkpoint(place / "plain", {**LLAMA, "num_hidden_layers": 1})
    return quantize_checkpoint(plain, place / "packed", 32)


def config_of(source: Path, device: str, **options: Any) -> RunnerConfig:
    settings: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "num_blocks": NUM_BLOCKS,
        "max_model_len": 32,
        "max_batched_tokens": 24,
        "max_batch_size": 4,
        "is_poisoned": True,
    }
    return RunnerConfig(source=source, device=device, dtype="float32", **{**settings, **options})


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> ModelRunner:
    """The CPU's runner."""
    runner = load_runner(config_of(checkpoint, "cpu", is_deterministic=False))
    assert isinstance(runner, ModelRunner)
    return runner


@pytest.fixture(scope="module")
def runner(checkpoint: Path, device: str) -> Any:
    """The accelerator's, with the kernels in place of the CPU's operations for this module's tests of it."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setitem(ops._BACKENDS, "cpu", GpuBackend)
        yield load_device_runner(config_of(checkpoint, device))


@pytest.fixture
def cpu_operations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the CPU's own operations back while the plain runner is asked."""

    class Swap:
        def __enter__(self) -> None:
            self.kept = ops._BACKENDS["cpu"]
            ops._BACKENDS["cpu"] = ops.CpuBackend

        def __exit__(self, *_: object) -> None:
            ops._BACKENDS["cpu"] = self.kept

    return Swap


def sequences_of(names: str = "abc") -> dict[str, Sequence]:
    found = {}
    for index, name in enumerate("abc"):
        params = SamplingParams(max_tokens=20, **PARAMS[name])
        sequence = Sequence(
            name, list(PROMPTS[name]), params, sample_index=index, eos_token_ids=frozenset({1, 40})
        )
        sequence.block_table = [3 * index + 1, 3 * index]
        if name in names:
            found[name] = sequence
    return found


def prefill(sequence: Sequence) -> Chunk:
    return Chunk(sequence, 0, len(sequence.token_ids), True)


def decode(sequence: Sequence, input_row: int | None = None) -> Chunk:
    start = len(sequence.token_ids) - (input_row is None)
    return Chunk(sequence, start, 1, True, input_row)


def take(sequences: list[Sequence], results: list[Any]) -> None:
    for sequence, result in zip(sequences, results, strict=True):
        assert isinstance(result, SampledToken), result
        sequence.append(result.token_id)


def plain_results(plain: ModelRunner, num_steps: int, names: str = "abc") -> list[list[Any]]:
    """What the CPU's runner draws, step by step."""
    sequences = list(sequences_of(names).values())
    results = []
    for step in range(num_steps):
        chunks = [decode(s) if step else prefill(s) for s in sequences]
        for chunk in chunks:
            plain.prepare(chunk)
        results.append(plain.sample(plain.forward(chunks), chunks))
        take(sequences, results[-1])
    for sequence in sequences:
        plain.forget(sequence)
    return results


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_id == theirs.token_id
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [i for i, _ in ours.top_logprobs] == [i for i, _ in theirs.top_logprobs]


class FakeGraph:
    """A graph on a CPU: calls the step again, which reads its static arrays."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self.output: Tensor = step()

    def replay(self) -> None:
        self.output = self._step()


def use_graphs(runner: DeviceRunner) -> StepGraphs:
    if runner.device.type == "cpu":
        graphs = StepGraphs(
            4, 2, lambda shape: FakeGraph(torch.inference_mode()(lambda: runner._forward(shape)))
        )
    else:
        graphs = StepGraphs(4, 2, runner._capture)
    runner.graphs = graphs
    return graphs


@pytest.mark.parametrize("has_graphs", [False, True])
def test_the_tokens_of_the_plain_runner_with_a_step_in_flight(
    plain: ModelRunner, runner: DeviceRunner, cpu_operations: Any, has_graphs: bool
) -> None:
    """Each step is launched before the one before it is collected, its rows in another order."""
    with cpu_operations():
        expected = plain_results(plain, 7)
    graphs = use_graphs(runner) if has_graphs else None
    sequences = list(sequences_of().values())
    chunks = [prefill(s) for s in sequences]
    for chunk in chunks:
        runner.prepare(chunk)
    launched, order = runner.launch(chunks, []), [0, 1, 2]
    for step in range(7):
        ahead = list(reversed(order))
        following = None
        if step < 6:
            rows = {member: row for row, member in enumerate(order)}
            following = runner.launch([decode(sequences[m], rows[m]) for m in ahead], [])
        results = runner.collect(launched)
        take([sequences[m] for m in order], results)
        assert_same([results[order.index(m)] for m in range(3)], expected[step])
        launched, order = following, ahead
    for sequence in sequences:
        runner.forget(sequence)
        runner.forget(sequence)
    assert runner._sampler.num_states == runner._sampler.num_counted_rows == 0
    if graphs is not None:
        assert graphs.num_captured == 1
        runner.graphs = None


def test_a_mixed_batch_and_copied_blocks(
    plain: ModelRunner, runner: DeviceRunner, cpu_operations: Any
) -> None:
    """A decode in flight beside a prompt in two chunks, whose head is copied from another's block."""
    with cpu_operations():
        alone = plain_results(plain, 2, "a"), plain_results(plain, 1, "c")
    first, second = sequences_of()["a"], sequences_of()["c"]
    runner.prepare(prefill(first))
    runner.prepare(prefill(second))
    head = Chunk(second, 0, 4, False)
    one = runner.launch([prefill(first), head], [])
    # The head lies in second's own block; a copy of it moves on to a fresh one.
    copy = BlockCopy(second.block_table[0], 11, 4)
    second.block_table[0] = 11
    tail = Chunk(second, 4, len(PROMPTS["c"]) - 4, True)
    two = runner.launch([tail, decode(first, 0)], [copy])
    first_results, second_results = runner.collect(one), runner.collect(two)
    assert_same(first_results, alone[0][0])
    assert_same(second_results, [alone[1][0][0], alone[0][1][0]])
    runner.forget(first)
    runner.forget(second)


def test_a_resumed_sequence_counts_what_it_was_given(
    plain: ModelRunner, runner: DeviceRunner, cpu_operations: Any
) -> None:
    with cpu_operations():
        expected = plain_results(plain, 6, "b")
    emitted = [results[0].token_id for results in expected[:4]]
    resumed = Sequence("b", list(PROMPTS["b"]), sequences_of()["b"].params, emitted, sample_index=1)
    resumed.block_table = [5, 6]
    runner.prepare(prefill(resumed))
    one = runner.launch([prefill(resumed)], [])
    two = runner.launch([decode(resumed, 0)], [])
    assert_same(runner.collect(one) + runner.collect(two), [expected[4][0], expected[5][0]])
    runner.forget(resumed)


def test_logits_that_are_not_finite_end_their_own_row(runner: DeviceRunner) -> None:
    sequences = list(sequences_of("ac").values())
    for sequence in sequences:
        runner.prepare(prefill(sequence))
    real = runner._forward

    def broken(shape: StepShape, chunks: Any = ()) -> Tensor:
        logits = real(shape, chunks)
        logits[0, 3] = float("nan")
        return logits

    runner._forward = broken  # type: ignore[method-assign]
    try:
        bad, good = runner.collect(runner.launch([prefill(s) for s in sequences], []))
    finally:
        del runner._forward
    assert isinstance(bad, ValueError)
    assert "finite" in str(bad)
    assert isinstance(good, SampledToken)
    for sequence in sequences:
        runner.forget(sequence)


def test_a_step_without_samples_or_without_chunks_has_nothing_to_collect(runner: DeviceRunner) -> None:
    sequence = sequences_of()["c"]
    assert runner.collect(runner.launch([Chunk(sequence, 0, 3, False)], [])) == []
    assert runner.collect(runner.launch([], [BlockCopy(1, 2, 3)])) == []


def test_a_step_that_draws_nothing_is_waited_for_too(
    runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mark:
        num_waits = 0

        def synchronize(self) -> None:
            self.num_waits += 1

    marks = [Mark(), Mark()]
    monkeypatch.setattr(runner, "_mark", iter(marks).__next__)
    steps = [
        runner.launch([Chunk(sequences_of()["c"], 0, 3, False)], []),
        runner.launch([], [BlockCopy(1, 2, 3)]),
    ]
    assert [mark.num_waits for mark in marks] == [0, 0]
    for step in steps:
        assert runner.collect(step) == []
    assert [mark.num_waits for mark in marks] == [1, 1]


def test_no_step_copies_to_the_device_in_a_way_that_waits(
    runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bias, bans, penalties and logprobs: all that a step can need from the host."""
    make, kinds = torch.tensor, []

    def tensor(*values: Any, **options: Any) -> Tensor:
        kinds.append(options.get("device"))
        return make(*values, **options)

    monkeypatch.setattr(torch, "tensor", tensor)
    sequences = list(sequences_of().values())
    for sequence in sequences:
        runner.prepare(prefill(sequence))
    runner.collect(runner.launch([prefill(s) for s in sequences], [BlockCopy(1, 11, 3)]))
    for sequence in sequences:
        runner.forget(sequence)
    assert len(kinds) > 6
    assert set(kinds) == {None}, "made on the host, in memory that is sent without waiting"


def test_warming_up_runs_all_classes_of_rows_and_every_draw_and_leaves_nothing(
    runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, params = [], []
    forward, launch = runner._forward, runner._sampler.launch

    def run(shape: StepShape, chunks: Any = ()) -> Tensor:
        shapes.append(shape)
        return forward(shape, chunks)

    def draw(logits: Tensor, sequences: Any, *rest: Any, **options: Any) -> Any:
        params.extend(sequence.params for sequence in sequences)
        return launch(logits, sequences, *rest, **options)

    monkeypatch.setattr(runner, "_forward", run)
    monkeypatch.setattr(runner._sampler, "launch", draw)
    runner.warm_up()
    assert {1, 2, 4, 8, 16, 24} <= {shape.num_rows for shape in shapes}
    full = {shape.max_query_len for shape in shapes if shape.num_seqs == 4}
    assert full == {1, 6}, "decodes and chunks of as many sequences as there may be"
    assert max(shape.table_width for shape in shapes) * BLOCK_SIZE >= 32, "a decode of a long context"
    assert any(p.top_k and p.top_p < 1 and p.min_p and p.repetition_penalty != 1 for p in params)
    assert any(p.top_k == 0 and p.repetition_penalty == 1 for p in params)
    assert sum(p.logprobs is not None and p.repetition_penalty != 1 for p in params) == 4, "all of a batch"
    assert (runner._sampler.num_states, runner._sampler.num_counted_rows) == (0, 0)


def test_what_it_says_of_itself(runner: DeviceRunner, device: str) -> None:
    info = runner.info
    assert info.device == device
    assert info.num_blocks == NUM_BLOCKS
    assert device in info.numerics_id
    assert not info.is_deterministic


def test_devices_that_are_not_there_are_named() -> None:
    for name in ("xpu", "tpu:0", "cuda:x", "cpu:0"):
        with pytest.raises(RunnerConfigError, match=r"not supported"):
            open_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(RunnerConfigError, match="no CUDA device"):
            open_device("cuda")
    else:
        with pytest.raises(RunnerConfigError, match="there are"):
            open_device("cuda:99")


def test_the_device_says_whether_an_error_is_its_end() -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert is_device_fault(RuntimeError("CUDA error: an illegal memory access was encountered"), lost)
    assert is_device_fault(RuntimeError("Triton Error [CUDA]: misaligned address"), lost)
    refused = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    assert not is_device_fault(refused, lambda: None), "the next call may well succeed"
    assert not is_device_fault(torch.OutOfMemoryError("full"), lost)
    assert not is_device_fault(ValueError("CUDA error"), lost), "nothing of the device's: it is not asked"
