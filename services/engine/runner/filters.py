"""min_p, top_k and top_p, then the draw among what is left, without sorting a vocabulary.

Rows with a top_k take their k likeliest ids in order. Rows without draw from the whole vocabulary and ask
whether the id drawn is among those kept, that is, whether too much mass lies before it; if not, neither is
anything behind it, so all that is struck out and the draw repeated with the same noise. What comes out is the
winner among the kept ids, and mostly at the first try. Knows logits and parameters only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.sequence import SamplingParams
from services.engine.runner.philox import DrawKeys, gumbel

_ID_MASK = 0xFFFFFFFF


def rank_keys(logits: Tensor) -> Tensor:
    """int64 keys for fp32 [rows, vocab] that sort by logit and, among equals, by the lower id first when
    descending.

    The high half is the float's bits mapped to integers of the same order, the low half the complement of the
    id: no two keys are equal, so every selection algorithm picks the same ids.
    """
    ids = torch.arange(logits.shape[1], device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)  # negative floats sort by falling magnitude
    return bits.to(torch.int64).bitwise_left_shift_(32).add_(_ID_MASK - ids)


def ids_of(keys: Tensor) -> Tensor:
    """The vocabulary ids within keys of `rank_keys`."""
    return _ID_MASK - (keys & _ID_MASK)


def row_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension of [n, m], kept. A lone row is doubled: torch sums one row in another
    order.
    """
    if values.shape[0] == 1:
        return values.expand(2, -1).sum(-1, keepdim=True)[:1]
    return values.sum(-1, keepdim=True)


def draw_top_k(edited: Tensor, scaled: Tensor, params: list[SamplingParams], keys: DrawKeys) -> Tensor:
    """Token ids [n] for rows that all have a top_k: min_p, then top_k, then top_p of what these left.

    `edited` are fp32 logits [n, vocab], `scaled` the same in fp64 over the temperature.
    """
    limits = torch.tensor([[p.top_k, p.top_p, p.min_p] for p in params], dtype=torch.float64)
    top_k, top_p, min_p = limits[:, :, None].unbind(1)
    width = min(max(p.top_k for p in params), edited.shape[1])
    ids = ids_of(rank_keys(edited).topk(width, dim=-1).values)
    values = scaled.gather(1, ids)
    weights = (values - values[:, :1]).exp_()
    is_kept = (weights >= min_p) & (torch.arange(width)[None, :] < top_k)
    weights = weights * is_kept
    cumulative = weights.cumsum(-1)  # ids that are not kept add 0, so the width does not show in a row's bits
    is_kept &= (cumulative - weights) < top_p * cumulative[:, -1:]
    noisy = gumbel(keys.words_of(ids)).add_(values).masked_fill_(~is_kept, float("-inf"))
    return ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(1)


def draw_top_p(edited: Tensor, scaled: Tensor, params: list[SamplingParams], keys: DrawKeys) -> Tensor:
    """Token ids [n] for rows without a top_k: min_p, then top_p of what it left."""
    limits = torch.tensor([[p.top_p, p.min_p] for p in params], dtype=torch.float64)
    top_p, min_p = limits[:, :, None].unbind(1)
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    is_small = weights < min_p
    weights.masked_fill_(is_small, 0.0)
    allowed = top_p * row_sum(weights)
    noisy = gumbel(keys.all_words(edited.shape[1])).add_(scaled).masked_fill_(is_small, float("-inf"))
    ranks = rank_keys(edited)
    tokens = noisy.argmax(-1)
    pending = torch.arange(len(params))
    while True:
        is_behind = ranks <= ranks.gather(1, tokens[pending, None])
        before = row_sum(weights.masked_fill(is_behind, 0.0))
        # The likeliest id has nothing before it, so a row of numbers ends; one with NaN is refused by the
        # caller.
        is_open = ((before >= allowed) & (before > 0)).squeeze(1)
        if not bool(is_open.any()):
            return tokens
        pending = pending[is_open]
        ranks, weights, allowed = ranks[is_open], weights[is_open], allowed[is_open]
        noisy = noisy[is_open].masked_fill_(is_behind[is_open], float("-inf"))
        tokens[pending] = noisy.argmax(-1)
