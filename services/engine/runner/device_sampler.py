"""Sampling that never waits: tokens are drawn on the device, and a copy for the host is queued behind them.

The semantics, and for equal logits the tokens, are `sampler`'s: the same order of edits and filters, the same
keyed noise. Knows sequences' parameters and tokens; does not know blocks, batches or stop conditions. On a
CPU it runs in Triton's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.core.batch import SampledToken
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels.gpu.sampling import PARAM_WORDS, draw
from services.engine.runner.device_edits import DeviceRow, PenaltyCounts, apply_device_edits
from services.engine.runner.logprobs import RowLogprobs, SamplingError, measure_logprobs, sampled_tokens
from services.engine.runner.transfer import fetch, send, send_values

_MASK = 0xFFFFFFFF


@dataclass(slots=True)
class PendingTokens:
    """Tokens on their way to the host: valid once what was queued before has run.

    `wanted` are the rows that asked for logprobs, `found` theirs, `counts` how many alternatives each gets.
    """

    tokens: Tensor
    status: Tensor
    has_edits: list[bool]
    wanted: list[int]
    counts: list[int]
    found: RowLogprobs | None


class DeviceSampler:
    """Holds what sampling needs per sequence between steps, on the device."""

    def __init__(self, vocab_size: int, max_batch_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.max_batch_size = max_batch_size
        self._device = device
        self._status = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self._counts = PenaltyCounts(vocab_size, device)
        self._rows: dict[Sequence, DeviceRow] = {}

    @property
    def num_states(self) -> int:
        """Sequences that have state."""
        return len(self._rows)

    @property
    def num_counted_rows(self) -> int:
        """Sequences whose tokens are counted for a penalty."""
        return self._counts.num_used

    def prepare(self, sequence: Sequence) -> None:
        """Make a sequence's state, or bring it up to date with what the host knows; bad parameters raise
        SamplingError. Not while one of its tokens is in flight.
        """
        row = self._rows.get(sequence)
        if row is None:
            row = self._rows[sequence] = DeviceRow(sequence, self.vocab_size, self._device)
        if row.has_penalty and (row.slot is None or row.num_counted != sequence.num_output_tokens):
            self._counts.open(row)

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence's state; may come twice, and while a launched draw still uses it."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._counts.close(row)

    def launch(
        self, logits: Tensor, sequences: SequenceABC[Sequence], offsets: SequenceABC[int], *, out: Tensor
    ) -> PendingTokens:
        """Queue the draw for fp32 logits [n, vocab], row i for sequences[i], whose token gets place
        offsets[i] in its completion. The ids land in `out` int64 [>= n] on the device.
        """
        num_rows = len(sequences)
        rows = [self._rows[sequence] for sequence in sequences]
        edited = apply_device_edits(logits, rows, offsets, self._counts)
        params = [sequence.params for sequence in sequences]
        draw(
            edited,
            send(_pack_params(sequences, offsets), self._device),
            has_filters=any(self._has_filter(p) for p in params),
            token_ids=out,
            status=self._status,
        )
        penalized = [(index, row) for index, row in enumerate(rows) if row.has_penalty]
        if penalized:
            self._counts.count(out, penalized)
        wanted = [index for index, p in enumerate(params) if p.logprobs is not None]
        counts = [params[index].logprobs or 0 for index in wanted]
        found = None
        if wanted:
            chosen = send_values(wanted, torch.int64, self._device)
            found = measure_logprobs(logits[chosen], out[chosen], max(counts))
            found = RowLogprobs(*map(fetch, found))
        has_edits = [
            row.bias is not None or row.has_penalty or bool(row.banned(offset))
            for row, offset in zip(rows, offsets, strict=True)
        ]
        tokens, status = fetch(out[:num_rows]), fetch(self._status[:num_rows])
        return PendingTokens(tokens, status, has_edits, wanted, counts, found)

    def collect(self, pending: PendingTokens) -> list[SampledToken | Exception]:
        """The tokens of a draw that has run. A row's failure takes its place in the result."""
        tokens = pending.tokens.tolist()
        results: list[SampledToken | Exception] = [SampledToken(token) for token in tokens]
        if pending.found is not None:
            chosen = [tokens[index] for index in pending.wanted]
            for index, token in zip(
                pending.wanted, sampled_tokens(chosen, pending.found, pending.counts), strict=True
            ):
                results[index] = token
        for index in pending.status.nonzero().flatten().tolist():
            results[index] = SamplingError(
                "no token has a finite logit after bias, bans and penalties"
                if pending.has_edits[index]
                else "logits are not finite"
            )
        return results

    def _has_filter(self, params: SamplingParams) -> bool:
        if params.temperature == 0:
            return False
        return 0 < params.top_k < self.vocab_size or params.top_p < 1 or params.min_p > 0


def _pack_params(sequences: SequenceABC[Sequence], offsets: SequenceABC[int]) -> Tensor:
    """int32 [n, PARAM_WORDS]: what the draw's kernels read of each row."""
    words = np.empty((len(sequences), PARAM_WORDS), np.uint32)
    floats = words.view(np.float32)
    for index, (sequence, offset) in enumerate(zip(sequences, offsets, strict=True)):
        params = sequence.params
        floats[index, 0] = params.temperature
        words[index, 1] = params.top_k
        floats[index, 2] = params.top_p
        floats[index, 3] = params.min_p
        words[index, 4] = params.seed & _MASK
        words[index, 5] = params.seed >> 32
        words[index, 6] = sequence.sample_index
        words[index, 7] = offset
    return torch.from_numpy(words.view(np.int32))
