"""From logits to tokens, one row per sequence, each row's result independent of the rows beside it.

The order, as in vLLM: logit bias, banned ids, penalties (repetition, frequency, presence), temperature,
min_p, top_k, top_p, draw. The draw is the Gumbel-max of keyed noise (`philox`). Logprobs are those of the
logits as the model gave them. Temperature 0 is the arg-max after bias, bans and penalties; the lowest id wins
a tie, here and in top_k.

Knows sequences' parameters and tokens; does not know blocks, batches or stop conditions.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import torch
from torch import Tensor

from services.engine.core.batch import SampledToken
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.runner.filters import draw_top_k, draw_top_p
from services.engine.runner.logprobs import SamplingError, logprobs_of
from services.engine.runner.penalties import RowState, apply_edits
from services.engine.runner.philox import DrawKeys, gumbel


class Sampler:
    """Holds what sampling needs per sequence (penalty counts, bias tensors) between steps."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._states: dict[Sequence, RowState] = {}

    def prepare(self, sequence: Sequence) -> None:
        """Make a sequence's state, once; bad parameters raise SamplingError."""
        if sequence not in self._states:
            self._states[sequence] = RowState(sequence, self.vocab_size)

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence's state; may come twice."""
        self._states.pop(sequence, None)

    @property
    def num_states(self) -> int:
        """Sequences that have state."""
        return len(self._states)

    def sample(self, logits: Tensor, sequences: SequenceABC[Sequence]) -> list[SampledToken | Exception]:
        """Draw for fp32 logits [n, vocab], row i for sequences[i]. A row's failure takes its place in the
        result.
        """
        if not sequences:
            return []
        try:
            return self._sample(logits, sequences)
        except Exception as error:
            # Find the row to blame: rows are independent, so one at a time gives the same tokens.
            if len(sequences) == 1:
                return [error]
            return [self.sample(logits[i : i + 1], [sequence])[0] for i, sequence in enumerate(sequences)]

    def _sample(self, logits: Tensor, sequences: SequenceABC[Sequence]) -> list[SampledToken | Exception]:
        for sequence in sequences:
            self.prepare(sequence)
        states = [self._states[sequence] for sequence in sequences]
        low, high = torch.aminmax(logits, dim=-1)
        is_finite = (torch.isfinite(low) & torch.isfinite(high)).tolist()
        good = [row for row, is_good in enumerate(is_finite) if is_good]
        results: list[SampledToken | Exception] = [SamplingError("logits are not finite")] * len(sequences)
        if not good:
            return results
        if len(good) < len(sequences):
            logits = logits[torch.tensor(good)]
            states = [states[row] for row in good]
        for row, token in zip(good, self._choose(logits, states), strict=True):
            results[row] = token
        return results

    def _choose(self, logits: Tensor, states: list[RowState]) -> list[SampledToken | Exception]:
        edited = apply_edits(logits, states)
        is_random = [state.params.temperature > 0 for state in states]
        if all(is_random):
            tokens = self._draw(edited, states)
        else:
            tokens = edited.argmax(dim=-1)
            if any(is_random):
                rows = torch.tensor(is_random).nonzero().flatten()
                tokens[rows] = self._draw(edited[rows], [s for s in states if s.params.temperature > 0])
        results: list[SampledToken | Exception] = [SampledToken(token) for token in tokens.tolist()]
        wanted = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        if wanted:
            counts = [states[row].params.logprobs or 0 for row in wanted]
            chosen = logprobs_of(logits[torch.tensor(wanted)], tokens[torch.tensor(wanted)], counts)
            for row, token in zip(wanted, chosen, strict=True):
                results[row] = token
        if edited is not logits:
            drawn = edited.gather(1, tokens[:, None]).squeeze(1)
            for row in (~torch.isfinite(drawn)).nonzero().flatten().tolist():
                results[row] = SamplingError("no token has a finite logit after bias, bans and penalties")
        return results

    def _draw(self, edited: Tensor, states: list[RowState]) -> Tensor:
        """Token ids int64 [n] for rows with a temperature."""
        params = [state.params for state in states]
        keys = DrawKeys(
            [p.seed for p in params],
            [state.sequence.sample_index for state in states],
            [state.sequence.num_output_tokens for state in states],
        )
        temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64)
        scaled = edited.double().div_(temperatures[:, None])
        kinds = [self._kind(p) for p in params]
        if len(set(kinds)) == 1:
            return _DRAWS[kinds[0]](edited, scaled, params, keys)
        tokens = torch.empty(len(states), dtype=torch.int64)
        for kind in sorted(set(kinds)):
            members = [row for row, found in enumerate(kinds) if found == kind]
            rows = torch.tensor(members)
            some = [params[row] for row in members]
            tokens[rows] = _DRAWS[kind](edited[rows], scaled[rows], some, keys.select(rows))
        return tokens

    def _kind(self, params: SamplingParams) -> str:
        if 0 < params.top_k < self.vocab_size:
            return "top_k"
        return "top_p" if params.top_p < 1 or params.min_p > 0 else "all"


def _draw_all(edited: Tensor, scaled: Tensor, params: list[SamplingParams], keys: DrawKeys) -> Tensor:
    """Token ids [n] for rows without a filter."""
    return gumbel(keys.all_words(edited.shape[1])).add_(scaled).argmax(dim=-1)


_DRAWS = {"all": _draw_all, "top_k": draw_top_k, "top_p": draw_top_p}
