"""The one place where the device lane's whole-model phases touch the engine: runners, random weights, core.

On a device the runner is the one that serves. Dry, it is the same runner on the CPU with the GPU's operations
put in for the CPU's, interpreted. Knows the engine's parts; measures nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_measure import Bench
from services.engine.core.admission import CoreLimits
from services.engine.core.batch import Chunk
from services.engine.core.block_manager import BlockManager
from services.engine.core.engine_core import EngineCore
from services.engine.core.scheduler import Scheduler, SchedulerConfig
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels import ops
from services.engine.kernels.linear import Linear
from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch
from services.engine.models.llama import Llama
from services.engine.models.loader import load_model, read_model_config, resolve_max_model_len
from services.engine.runner.config import RunnerConfig
from services.engine.runner.kv_cache import KVCache, choose_kv_format
from services.engine.runner.load import make_info
from services.engine.runner.model_runner import load_runner
from services.engine.runner.source import Source, open_source

GROUP = 128


@contextlib.contextmanager
def device_operations(bench: Bench) -> Iterator[None]:
    """Within, models compute by the GPU's kernels: on a device always, dry in the interpreter."""
    if not bench.is_dry:
        yield
        return
    from services.engine.kernels.gpu.backend import GpuBackend

    plain = ops._BACKENDS["cpu"]
    ops._BACKENDS["cpu"] = GpuBackend
    try:
        yield
    finally:
        ops._BACKENDS["cpu"] = plain


def cpu_runner(source: Path, **settings: Any) -> Any:
    """The plain twin: fp32 on the CPU, deterministic."""
    return load_runner(RunnerConfig(source=source, dtype="float32", is_deterministic=True, **settings))


def device_runner(bench: Bench, source: Path, **settings: Any) -> Any:
    """The runner that serves on a device, loaded as it loads: with self-test and warm-up.

    Dry: its parts put together in fp32 on the CPU, within `device_operations`; in the interpreter the
    self-test alone would take minutes.
    """
    if not bench.is_dry:
        return load_runner(RunnerConfig(source=source, device=bench.device.type, **settings))
    config = RunnerConfig(source=source, device="cpu", **(settings | {"dtype": "float32"}))
    opened = open_source(config)
    model_config = read_model_config(opened.checkpoint)
    numerics = Numerics(torch.float32, bool(config.is_deterministic), device=bench.device)
    length = resolve_max_model_len(model_config, config.max_model_len)
    model = load_model(opened.checkpoint, model_config, numerics, length)
    return _assemble(bench, config, model, numerics, length)


class RandomWeights:
    """Stands in for the loader of a checkpoint: seeded random weights of the true shapes, made on the device.

    Linears keep the size of what goes through them, so that no layer's output overflows. `weight_bits` 4
    makes every decoder linear a 4-bit one in groups of 128; embedding, norms and head stay as they are.
    """

    def __init__(self, numerics: Numerics, weight_bits: int) -> None:
        self.numerics = numerics
        self.scratch = Scratch()
        self._weight_bits = weight_bits
        self._generator = torch.Generator(numerics.device).manual_seed(0)

    def dense(self, name: str, shape: tuple[int, ...], *, offset: float = 0.0) -> Tensor:
        """Ones for a norm, whatever `offset` a loader would add; for the embedding, normal numbers."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.numerics.dtype, device=self.numerics.device)
        return self._normal(shape)

    def head(self, embedding: Tensor, name: str) -> Linear:
        """An output projection of its own."""
        weight = self._normal(tuple(embedding.shape)) * embedding.shape[1] ** -0.5
        return ops.make_dense_linear(weight, None, self.numerics)

    def linear(
        self,
        parts: Mapping[str, int],
        in_features: int,
        has_bias: bool,
        *,
        is_gate_up: bool = False,
        order: Tensor | None = None,
    ) -> Linear:
        """One fused linear for all parts. In what `order` their outputs come, random numbers do not care."""
        out_features = sum(parts.values())
        if self._weight_bits != 4:
            weight = self._normal((out_features, in_features)) * in_features**-0.5
            return ops.make_dense_linear(weight, None, self.numerics)
        groups = in_features // GROUP
        values, zeros = (
            self._integers(0, 16, (in_features, out_features)),
            self._integers(6, 10, (groups, out_features)),
        )
        spread = in_features**-0.5 / 4.6  # the standard deviation of 0 .. 15
        noise = torch.rand((groups, out_features), generator=self._generator, device=self.numerics.device)
        scales = (spread * (0.5 + noise)).half()
        return ops.make_int4_linear(
            values, zeros, scales, None, self.numerics, self.scratch, is_gate_up=is_gate_up
        )

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(
            shape, generator=self._generator, device=self.numerics.device, dtype=self.numerics.dtype
        )

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(
            low, high, shape, generator=self._generator, device=self.numerics.device, dtype=torch.uint8
        )


def random_runner(
    bench: Bench,
    raw_config: Mapping[str, Any],
    *,
    weight_bits: int,
    num_blocks: int,
    max_batch_size: int,
    max_model_len: int,
    max_batched_tokens: int = 8192,
    is_deterministic: bool = False,
    has_graphs: bool = True,
    kv_dtype: str = "auto",
    model: Llama | None = None,
) -> Any:
    """A runner of a model of this config.json with random weights; `model` takes another runner's instead."""
    numerics = Numerics(bench.dtype, is_deterministic, device=bench.device)
    config = RunnerConfig(
        source=Path("random"),
        device=bench.device.type,
        kv_dtype=kv_dtype,
        num_blocks=num_blocks,
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batched_tokens,
        has_graphs=has_graphs,
    )
    if model is None:
        model = Llama(Llama.parse(raw_config), RandomWeights(numerics, weight_bits), max_model_len)  # type: ignore[arg-type]
    model.use(numerics)
    return _assemble(bench, config, model, numerics, max_model_len)


def _assemble(
    bench: Bench, config: RunnerConfig, model: Llama, numerics: Numerics, max_model_len: int
) -> Any:
    """The device's runner around a model, without self-test or warm-up."""
    from services.engine.runner.device_runner import DeviceRunner

    kv_format = choose_kv_format(config, model.config, numerics.dtype)
    cache = KVCache(
        model.config,
        config.num_blocks or 1,
        config.block_size,
        kv_format,
        device=bench.device,
        is_poisoned=config.is_poisoned,
    )
    source = Source(None, "random", "", "", "", None, False)  # type: ignore[arg-type]
    return DeviceRunner(
        model,
        cache,
        numerics,
        make_info(config, source, model, cache, numerics, max_model_len, "", None),
        max_batched_tokens=config.max_batched_tokens,
        max_batch_size=config.max_batch_size,
        has_graphs=config.has_graphs and not bench.is_dry,
    )


def make_core(runner: Any, *, max_batch_size: int, max_batched_tokens: int) -> EngineCore:
    """The engine's core around a runner, without a prefix cache: prompts are random, none would hit."""
    info = runner.info
    blocks = BlockManager(info.num_blocks, info.block_size, namespace="", has_prefix_cache=False)
    limits = SchedulerConfig(
        max_batch_size=max_batch_size, max_batched_tokens=max_batched_tokens, prefill_chunk=max_batched_tokens
    )
    return EngineCore(
        runner, Scheduler(limits, blocks), blocks, CoreLimits(info.vocab_size, info.max_model_len, 1 << 20)
    )


class Sequences:
    """Sequences over a runner's blocks, computed by hand: prefill, then one token after the other."""

    def __init__(self, runner: Any, prompts: SequenceABC[list[int]], num_new: int) -> None:
        self.runner = runner
        size = runner.info.block_size
        free = iter(torch.randperm(runner.info.num_blocks).tolist())
        self.members = []
        for index, prompt in enumerate(prompts):
            sequence = Sequence(index, list(prompt), SamplingParams(max_tokens=num_new + 1, temperature=0.0))
            sequence.block_table = [next(free) for _ in range(-(-(len(prompt) + num_new) // size))]
            self.members.append(sequence)

    def prefill(self, step: int = 1 << 30) -> Tensor:
        """Logits [sequences, vocab] of each prompt's last token; `step` tokens of a prompt at a time, each
        prompt alone.
        """
        rows = []
        for sequence in self.members:
            length = len(sequence.token_ids)
            for start in range(0, length, step):
                stop = min(length, start + step)
                logits = self.runner.forward([Chunk(sequence, start, stop - start, stop == length)])
            rows.append(logits[:1].clone())
        return torch.cat(rows)

    def decode_chunks(self) -> list[Chunk]:
        """The newest token of each sequence as one batch."""
        return [Chunk(sequence, len(sequence.token_ids) - 1, 1, True) for sequence in self.members]

    def append(self, token_ids: SequenceABC[int]) -> None:
        """One token to each."""
        for sequence, token in zip(self.members, token_ids, strict=True):
            sequence.append(token)

    def decode(self) -> Tensor:
        """Logits [sequences, vocab] of one step over the newest tokens."""
        return self.runner.forward(self.decode_chunks()).clone()
