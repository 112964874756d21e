"""What changes logits before the draw: bias, bans, penalties; and the per-sequence state behind them.

Repetition (arXiv 1909.05858) counts prompt and output: a positive logit is divided by the penalty, any other
multiplied. Frequency and presence count the output alone: count * frequency, and presence once, are
subtracted. Knows parameters and tokens; draws nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.runner.logprobs import MAX_LOGPROBS, SamplingError


class RowState:
    """One sequence's bias tensors and penalty counts, brought up to date as its output grows."""

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        params = sequence.params
        check_params(params, vocab_size)
        self.sequence = sequence
        self.params = params
        self.vocab_size = vocab_size
        self.bias_ids = torch.tensor([token_id for token_id, _ in params.logit_bias], dtype=torch.int64)
        self.bias_values = torch.tensor([value for _, value in params.logit_bias], dtype=torch.float32)
        self.has_bias = bool(params.logit_bias)
        self.has_repetition = params.repetition_penalty != 1.0
        self.has_penalty = (
            self.has_repetition or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self._is_in_prompt: Tensor | None = None
        self._counts: Tensor | None = None
        self._num_counted = 0

    @property
    def has_edits(self) -> bool:
        """Whether the row's logits change at all before the draw."""
        return self.has_bias or self.has_penalty or bool(self.sequence.banned_token_ids)

    def counts(self) -> tuple[Tensor, Tensor]:
        """(bool [vocab] whether an id is in the prompt, fp32 [vocab] how often it is in the output)."""
        sequence = self.sequence
        num_output = sequence.num_output_tokens
        if self._is_in_prompt is None or self._counts is None or self._num_counted > num_output:
            self._is_in_prompt = torch.zeros(self.vocab_size, dtype=torch.bool)
            self._is_in_prompt[torch.tensor(sequence.prompt_token_ids, dtype=torch.int64)] = True
            self._counts = torch.zeros(self.vocab_size)
            self._num_counted = 0
        if self._num_counted < num_output:
            fresh = torch.tensor(sequence.token_ids[self._num_counted - num_output :])
            self._counts.index_add_(0, fresh, torch.ones(len(fresh)))
            self._num_counted = num_output
        return self._is_in_prompt, self._counts


def apply_edits(logits: Tensor, states: list[RowState]) -> Tensor:
    """Logits [n, vocab] with every row's bias, bans and penalties; the same tensor when there are none."""
    if not any(state.has_edits for state in states):
        return logits
    edited = logits.clone()
    for row, state in enumerate(states):
        if state.has_bias:
            edited[row].index_add_(0, state.bias_ids, state.bias_values)
    bans = [
        (row, token_id) for row, state in enumerate(states) for token_id in state.sequence.banned_token_ids
    ]
    if bans:
        where = torch.tensor(bans)
        edited[where[:, 0], where[:, 1]] = float("-inf")
    penalized = [row for row, state in enumerate(states) if state.has_penalty]
    if penalized:
        rows = torch.tensor(penalized)
        edited[rows] = _penalize(edited[rows], [states[row] for row in penalized])
    return edited


def _penalize(logits: Tensor, states: list[RowState]) -> Tensor:
    pairs = [state.counts() for state in states]
    in_prompt, counts = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    in_output = counts > 0
    repetition = torch.tensor([state.params.repetition_penalty for state in states])[:, None]
    frequency = torch.tensor([state.params.frequency_penalty for state in states])[:, None]
    presence = torch.tensor([state.params.presence_penalty for state in states])[:, None]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | in_output, repeated, logits)
    logits = logits - frequency * counts
    return logits - presence * in_output


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """What would make a row's arithmetic meaningless. The servers check requests; this keeps a slip to one
    row.
    """
    numbers = (
        params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
    )
    if not all(map(math.isfinite, numbers)) or params.temperature < 0:
        raise SamplingError("sampling parameters must be finite, temperature at least 0")
    if not 0 < params.top_p <= 1 or not 0 <= params.min_p <= 1 or params.top_k < 0:
        raise SamplingError("top_p must be in (0, 1], min_p in [0, 1], top_k at least 0")
    if not 0 < params.repetition_penalty < math.inf:
        raise SamplingError("repetition_penalty must be finite and above 0")
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise SamplingError(f"logprobs must be between 0 and {MAX_LOGPROBS}")
    for token_id, value in params.logit_bias:
        if not 0 <= token_id < vocab_size or not math.isfinite(value):
            raise SamplingError(
                f"logit_bias of id {token_id} is not a finite value of an id below {vocab_size}"
            )
    if any(not 0 <= token_id < vocab_size for token_id in params.stop_token_ids):
        raise SamplingError(f"stop_token_ids must be below {vocab_size}")
