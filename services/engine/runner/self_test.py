"""Finds out at load whether a row's bits really are the same in every batch, on this machine, with these
weights.

Two stages. Each distinct linear is fed the same rows in batches of many sizes and in another order. Then one
sequence is computed whole, in chunks, token by token, and beside others, and the logits are compared bit for
bit. The result also yields a fingerprint: equal fingerprints of equal weights mean that two machines round
alike.

Knows the model and the cache memory, which must not be in use yet.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels.linear import Linear
from services.engine.kernels.numerics import Numerics
from services.engine.models.llama import Llama
from services.engine.runner.config import RunnerConfig, RunnerConfigError
from services.engine.runner.inputs import make_inputs
from services.engine.runner.kv_cache import KVCache

_ROW_COUNTS = (1, 2, 3, 5, 7, 16, 17, 33, 64, 100)
_LEAST_ROWS = 128
_MAX_PRODUCT = {"cpu": 300_000_000, "cuda": 300_000_000_000}
"""Multiplications of the largest product tried per linear: bounds the test's time on large models."""
_LENGTH = 150
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """`failure` is None when every row kept its bits; else it says where the first did not."""

    failure: str | None
    fingerprint: str


@torch.inference_mode()
def run_self_test(
    model: Llama, cache: KVCache, numerics: Numerics, max_model_len: int, max_rows: int
) -> SelfTestResult:
    """Both stages, the first for engines that promise equal bits; `max_rows` is the largest batch to expect.
    Leaves meaningless contents in the cache's blocks.
    """
    failure = _check_linears(model.linears, numerics, max_rows) if numerics.is_deterministic else None
    reference, mixed = _SequenceTest(model, cache, numerics, max_model_len).run()
    fingerprint = hashlib.sha256(reference.numpy().tobytes()).hexdigest()[:8]
    for name, logits in mixed.items():
        if failure is None and not torch.equal(logits, reference):
            failure = f"logits of a sequence computed {name} differ from those computed whole"
    return SelfTestResult(failure, fingerprint)


def settle_numerics(
    model: Llama, cache: KVCache, numerics: Numerics, max_model_len: int, config: RunnerConfig
) -> tuple[Numerics, str]:
    """(numerics that hold here, fingerprint): the small attention tile if it passes, else the large one.

    When neither passes, an engine told to be deterministic refuses to start (RunnerConfigError); one that was
    merely about to be serves without the promise.
    """
    if not numerics.is_deterministic:
        return numerics, run_self_test(
            model, cache, numerics, max_model_len, config.max_batched_tokens
        ).fingerprint
    for tile in (numerics.query_tile, numerics.row_tile):
        tried = replace(numerics, query_tile=tile)
        model.use(tried)
        result = run_self_test(model, cache, tried, max_model_len, config.max_batched_tokens)
        if result.failure is None:
            return tried, result.fingerprint
        _log.warning("with query tiles of %d rows: %s", tile, result.failure)
    if config.is_deterministic:
        raise RunnerConfigError(f"deterministic mode does not hold on this machine: {result.failure}")
    tried = replace(tried, is_deterministic=False)
    model.use(tried)
    return tried, result.fingerprint


def _check_linears(linears: dict[str, Linear], numerics: Numerics, max_rows: int) -> str | None:
    seen: set[tuple[int, int, str]] = set()
    for name, linear in linears.items():
        kind = (linear.in_features, linear.out_features, linear.path)
        if kind in seen:
            continue
        seen.add(kind)
        affordable = _MAX_PRODUCT[numerics.device.type] // (linear.in_features * linear.out_features)
        num_rows = max(_LEAST_ROWS, min(max_rows, affordable))
        generator = torch.Generator().manual_seed(len(seen))
        x = torch.randn(num_rows, linear.in_features, generator=generator).to(numerics.device, numerics.dtype)
        whole = linear(x)
        order = torch.randperm(num_rows, generator=generator).to(x.device)
        if not torch.equal(linear(x[order]), whole[order]):
            return f"{name}: rows in another order differ"
        for count in _ROW_COUNTS:
            if not torch.equal(linear(x[:count]), whole[:count]):
                return f"{name}: {count} rows differ from the same rows among {num_rows}"
    return None


class _SequenceTest:
    """One sequence's logits at every position, computed in several ways over the cache's first blocks."""

    def __init__(self, model: Llama, cache: KVCache, numerics: Numerics, max_model_len: int) -> None:
        self.model, self.cache = model, cache
        self.row_tile = numerics.row_tile if numerics.is_deterministic else 1
        self.num_beside = 3 if cache.num_blocks >= 4 * -(-_LENGTH // cache.block_size) else 0
        room = cache.num_blocks // (1 + self.num_beside) * cache.block_size
        self.length = min(_LENGTH, max_model_len, room)
        self.blocks_each = -(-self.length // cache.block_size)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(
            model.config.vocab_size, (1 + self.num_beside, self.length), generator=generator
        )

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(logits [n, vocab] of the checked positions computed whole, the same computed in other ways)."""
        checked = sorted({*range(0, self.length, 7), self.length - 1})
        whole = self._logits([self.length])[checked]
        half = max(1, self.length // 2)
        singles = [half, *[1] * (self.length - half)]
        mixed = {"in chunks of 7": self._logits(_cut(self.length, 7))[checked]}
        mixed["token by token"] = self._logits(singles)[checked]
        if self.num_beside:
            mixed["beside others"] = self._logits(_cut(self.length, 50), num_beside=self.num_beside)[checked]
        return whole, mixed

    def _logits(self, lengths: list[int], num_beside: int = 0) -> Tensor:
        """fp32 [length, vocab] of sequence 0, computed in steps of these lengths; others take every second
        step alone.
        """
        members = [self._sequence(index) for index in range(1 + num_beside)]
        rows: list[Tensor] = []
        start = 0
        for length in lengths:
            spans = [Chunk(members[0], start, length, False)]
            for index, other in enumerate(members[1:]):
                spans.insert(index % 2, Chunk(other, start, length, False))
            rows.append(self._step(spans, members[0]))
            start += length
        return torch.cat(rows)

    def _sequence(self, index: int) -> Sequence:
        sequence = Sequence(
            key=index, prompt_token_ids=self.ids[index].tolist(), params=SamplingParams(max_tokens=1)
        )
        first = index * self.blocks_each
        sequence.block_table = list(range(first, first + self.blocks_each))
        return sequence

    def _step(self, chunks: list[Chunk], wanted: Sequence) -> Tensor:
        cache = self.cache
        inputs = make_inputs(chunks, cache.block_size, cache.scratch_block, self.row_tile, cache.device)
        first = 0
        for chunk in chunks:
            if chunk.sequence is wanted:
                break
            first += chunk.length
        rows = torch.arange(first, first + chunk.length)
        padded = torch.cat([rows, rows.new_zeros(-len(rows) % self.row_tile)]).to(cache.device)
        logits = self.model.forward(inputs.token_ids, inputs.metadata, cache.layers, padded)
        return logits[: len(rows)].cpu()


def _cut(length: int, step: int) -> list[int]:
    return [min(step, length - start) for start in range(0, length, step)]
