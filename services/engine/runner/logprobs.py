"""Log-probabilities of the model's own distribution: the chosen token's and the likeliest ones'. Knows logits
only.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from services.engine.core.batch import SampledToken
from services.engine.runner.filters import ids_of, rank_keys, row_sum

MAX_LOGPROBS = 20


class SamplingError(ValueError):
    """One row cannot be sampled; the others are not touched."""


def row_logsumexp(logits: Tensor) -> Tensor:
    """log(sum(exp(row))) in fp64, [n, 1]."""
    wide = logits.double()
    highest = wide.amax(-1, keepdim=True)
    return row_sum(wide.sub_(highest).exp_()).log_() + highest


class RowLogprobs(NamedTuple):
    """fp64 tensors: `chosen` [n], and `values` [n, k] of the likeliest `ids` int64 [n, k]."""

    chosen: Tensor
    ids: Tensor
    values: Tensor


def measure_logprobs(logits: Tensor, tokens: Tensor, most: int) -> RowLogprobs:
    """Logprobs for fp32 logits [n, vocab], chosen ids [n] and the `most` likeliest ids; does not wait for a
    device.
    """
    normalizer = row_logsumexp(logits)
    chosen = (logits.gather(1, tokens[:, None]).double() - normalizer).squeeze(1)
    ids = tokens.new_empty(len(tokens), 0)
    if most:
        ids = ids_of(rank_keys(logits).topk(min(most, logits.shape[1]), dim=-1).values)
    return RowLogprobs(chosen, ids, logits.gather(1, ids).double() - normalizer)


def sampled_tokens(tokens: list[int], found: RowLogprobs, counts: list[int]) -> list[SampledToken]:
    """The rows as the core takes them; row i gets its counts[i] likeliest."""
    rows = zip(tokens, found.chosen.tolist(), found.ids.tolist(), found.values.tolist(), counts, strict=True)
    return [
        SampledToken(token, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, ids, values, count in rows
    ]


def logprobs_of(logits: Tensor, tokens: Tensor, counts: list[int]) -> list[SampledToken]:
    """SampledToken with logprobs for fp32 logits [n, vocab] and chosen ids [n]; row i gets its counts[i]
    likeliest.
    """
    return sampled_tokens(tokens.tolist(), measure_logprobs(logits, tokens, max(counts)), counts)
