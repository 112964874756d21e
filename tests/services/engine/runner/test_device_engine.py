"""The whole engine over the accelerator's runner, a step in flight: the tokens of the plain engine.

Prompts in chunks, a shared head, a cache too small for all, a cancel while its token is in flight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.engine.core.admission import CoreLimits
from services.engine.core.block_manager import BlockManager
from services.engine.core.engine_core import EngineCore
from services.engine.core.scheduler import Scheduler, SchedulerConfig
from services.engine.core.sequence import FinishReason, SamplingParams, Sequence
from services.engine.kernels import ops
from services.engine.kernels.gpu.backend import GpuBackend
from services.engine.runner.device_load import load_device_runner
from services.engine.runner.device_runner import DeviceRunner
from services.engine.runner.model_runner import load_runner
from tests.services.engine.models.checkpoints import LLAMA, quantize_checkpoint, write_checkpoint
from tests.services.engine.runner.test_device_runner import config_of, use_graphs

BLOCK_SIZE, NUM_BLOCKS = 16, 3
HEAD = [5, 9, 33, 71, 2, 60, 12, 18, 90, 44, 3, 3, 7, 81, 29, 64, 50, 11]
REQUESTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "greedy": (HEAD, {"temperature": 0.0, "max_tokens": 14, "ignore_eos": True}),
    "drawn": (
        [44, 8],
        {"seed": 7, "max_tokens": 18, "presence_penalty": 1.8, "frequency_penalty": 1.5, "min_tokens": 18},
    ),
    "same head": ([*HEAD[:17], 1], {"seed": 3, "top_k": 9, "max_tokens": 4, "logprobs": 2}),
    "cancelled": ([13, 37], {"seed": 1, "max_tokens": 14, "ignore_eos": True}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of one layer, in groups of 32."""
    place = tmp_path_factory.mktemp("model")
    plain = write_checkpoint(place / "plain", {**LLAMA, "num_hidden_layers": 1})
    return quantize_checkpoint(plain, place / "packed", 32)


def run(runner: Any) -> tuple[dict[str, list[Any]], dict[str, FinishReason], int]:
    """(tokens, ends, preemptions) of all requests; one of them is cancelled after its third token."""
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE, namespace="test", min_head=1)
    config = SchedulerConfig(max_batch_size=4, max_batched_tokens=12, prefill_chunk=10)
    core = EngineCore(runner, Scheduler(config, blocks), blocks, CoreLimits(97, 32, 8), now=lambda: 1.0)
    for index, (name, (prompt, params)) in enumerate(REQUESTS.items()):
        sequence = Sequence(
            name, list(prompt), SamplingParams(**params), sample_index=index, arrival=float(index + 1)
        )
        sequence.eos_token_ids = frozenset({40, 41, 42})
        core.add(sequence)
    tokens: dict[str, list[Any]] = {name: [] for name in REQUESTS}
    ends: dict[str, FinishReason] = {}
    for _ in range(200):
        report = core.step()
        for event in report.tokens:
            assert event.position == len(tokens[str(event.key)])
            tokens[str(event.key)].append((event.token_id, [i for i, _ in event.top_logprobs]))
        ends.update({str(end.key): end.reason for end in report.finished})
        core.check_integrity()
        if len(tokens["cancelled"]) == 3:
            core.cancel("cancelled")
        if len(ends) == len(REQUESTS):
            break
    core.settle()
    assert blocks.counts().active == 0
    return tokens, ends, core.report().counters.preemptions


def fail_once(monkeypatch: pytest.MonkeyPatch, runner: DeviceRunner, verb: str, at: int) -> None:
    """One call fails when its work is done: penalties are counted, tokens drawn, keys written."""
    real, calls = getattr(runner, verb), iter(range(1000))

    def failing(*arguments: Any) -> Any:
        result = real(*arguments)
        if next(calls) == at:
            raise ValueError("planted")
        return result

    monkeypatch.setattr(runner, verb, failing)


@pytest.mark.parametrize("has_failures", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_tokens_of_the_plain_engine(
    checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch, has_failures: bool
) -> None:
    """Also when steps fail, and their sequences, and those of the step on top, are computed again alone."""
    config = config_of(checkpoint, "cpu", num_blocks=NUM_BLOCKS, is_deterministic=True)
    expected, expected_ends, _ = run(load_runner(config))
    if device == "cpu":
        monkeypatch.setitem(ops._BACKENDS, "cpu", GpuBackend)
        # Nothing is to be compiled, and the interpreter takes its time over every row.
        monkeypatch.setattr(DeviceRunner, "warm_up", lambda _: None)
    runner = load_device_runner(config_of(checkpoint, device, num_blocks=NUM_BLOCKS))
    use_graphs(runner)
    runner.has_overlap = True
    if has_failures:
        fail_once(monkeypatch, runner, "launch", 5)
        fail_once(monkeypatch, runner, "collect", 9)
    tokens, ends, preemptions = run(runner)
    for name, drawn in tokens.items():
        assert drawn == expected[name][: len(drawn)], name
    assert ends == expected_ends
    assert ends["cancelled"] is FinishReason.CANCELLED
    assert len(tokens["greedy"]) == len(expected["greedy"])
    assert preemptions, "the cache was to be too small"
    assert runner._sampler.num_states == runner._sampler.num_counted_rows == 0
