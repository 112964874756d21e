"""What changes logits on a device before the draw: bias, bans, penalties, and the counts they need.

The counts live on the device and are brought up to date there, by the draw itself: the host may be a token
behind. Semantics are `penalties`'. Knows sequences' parameters; draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC

import torch
from torch import Tensor

from services.engine.core.sequence import Sequence
from services.engine.kernels.gpu.penalties import IN_PROMPT, penalize
from services.engine.runner.penalties import check_params
from services.engine.runner.transfer import send_values

_GROWTH = 8
"""Rows of counts by which their table grows: 4 MiB for a vocabulary of 128 thousand."""


class DeviceRow:
    """One sequence's part in sampling: constants on the device, and its row in the table of counts.

    `num_counted` output tokens are in the counts, or on their way there.
    """

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        params = sequence.params
        check_params(params, vocab_size)
        self.sequence = sequence
        self.slot: int | None = None
        self.num_counted = 0
        self.bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self.bias = send_values(ids, torch.int64, device), send_values(values, torch.float32, device)
        self.has_penalty = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self.strengths = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)

    def banned(self, offset: int) -> frozenset[int]:
        """Ids that may not be drawn at this place of the completion."""
        params = self.sequence.params
        return self.sequence.stop_ids if offset < params.min_tokens else frozenset()


class PenaltyCounts:
    """A table int32 [slots, vocab] on the device; only sequences with a penalty have a slot."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []

    @property
    def num_used(self) -> int:
        """Slots that belong to a sequence."""
        return len(self._table) - len(self._free)

    def open(self, row: DeviceRow) -> None:
        """Give a row its slot, and count the prompt and what the host knows of the output."""
        if row.slot is None:
            if not self._free:
                self._grow()
            row.slot = self._free.pop()
        sequence, counts = row.sequence, self._table[row.slot]
        counts.zero_()
        prompt = send_values(sequence.prompt_token_ids, torch.int64, counts.device)
        counts.index_fill_(0, prompt, IN_PROMPT)
        if sequence.num_output_tokens:
            output = send_values(sequence.output_token_ids, torch.int64, counts.device)
            counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        row.num_counted = sequence.num_output_tokens

    def close(self, row: DeviceRow) -> None:
        """Take a row's slot back. Work queued on it comes before the next owner's."""
        if row.slot is not None:
            self._free.append(row.slot)
            row.slot = None

    def penalize(self, edited: Tensor, rows: SequenceABC[tuple[int, DeviceRow]]) -> None:
        """Apply the penalties of (logits row, sequence's row) pairs in place."""
        slots = [(index, row.slot) for index, row in rows]
        device = edited.device
        penalize(
            edited,
            self._table,
            send_values(slots, torch.int32, device),
            send_values([row.strengths for _, row in rows], torch.float32, device),
        )

    def count(self, tokens: Tensor, rows: SequenceABC[tuple[int, DeviceRow]]) -> None:
        """Count what was drawn: int64 tokens [n], the pairs as in `penalize`."""
        indices, slots = send_values(
            [[index for index, _ in rows], [row.slot for _, row in rows]], torch.int64, tokens.device
        )
        places = slots * self._table.shape[1] + tokens[indices]
        self._table.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        for _, row in rows:
            row.num_counted += 1

    def _grow(self) -> None:
        old = len(self._table)
        fresh = self._table.new_zeros(_GROWTH, self._table.shape[1])
        self._table = torch.cat((self._table, fresh))
        self._free += range(old, old + _GROWTH)


def apply_device_edits(
    logits: Tensor, rows: SequenceABC[DeviceRow], offsets: Iterable[int], counts: PenaltyCounts
) -> Tensor:
    """Logits [n, vocab] with every row's bias, bans and penalties; the same tensor when there are none."""
    bans = [
        (index, token_id)
        for index, (row, offset) in enumerate(zip(rows, offsets, strict=True))
        for token_id in row.banned(offset)
    ]
    penalized = [(index, row) for index, row in enumerate(rows) if row.has_penalty]
    biased = [(index, row.bias) for index, row in enumerate(rows) if row.bias is not None]
    if not (bans or penalized or biased):
        return logits
    edited = logits.clone(memory_format=torch.contiguous_format)
    for index, (ids, values) in biased:
        edited[index].index_add_(0, ids, values)
    if bans:
        places = send_values([row * logits.shape[1] + i for row, i in bans], torch.int64, logits.device)
        edited.view(-1).index_fill_(0, places, float("-inf"))
    if penalized:
        counts.penalize(edited, penalized)
    return edited
