"""Log-probabilities of the model's own distribution: the chosen token's and the likeliest ones'. Knows logits
only.
"""

from __future__ import annotations

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


def logprobs_of(logits: Tensor, tokens: Tensor, counts: list[int]) -> list[SampledToken]:
    """SampledToken with logprobs for fp32 logits [n, vocab] and chosen ids [n]; row i gets its counts[i]
    likeliest.
    """
    normalizer = row_logsumexp(logits)
    chosen = (logits.gather(1, tokens[:, None]).double() - normalizer).squeeze(1).tolist()
    most = min(max(counts), logits.shape[1])
    if not most:
        return [SampledToken(token, logprob) for token, logprob in zip(tokens.tolist(), chosen, strict=True)]
    ids = ids_of(rank_keys(logits).topk(most, dim=-1).values)
    values = (logits.gather(1, ids).double() - normalizer).tolist()
    rows = zip(tokens.tolist(), chosen, ids.tolist(), values, counts, strict=True)
    return [
        SampledToken(token, logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, logprob, row_ids, row_values, count in rows
    ]
