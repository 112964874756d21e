"""min_p, top_k and top_p on sorted candidates, then the draw among what is left.

Rows are first cut to their 256 likeliest ids, which nearly always decides; a row that 256 do not decide is
done again with its whole vocabulary. Whether it is depends on that row alone. Knows logits and parameters
only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.sequence import SamplingParams
from services.engine.runner.philox import DrawKeys, gumbel

_CANDIDATES = 256
_ID_MASK = 0xFFFFFFFF


def rank_keys(logits: Tensor) -> Tensor:
    """int64 keys for fp32 [rows, vocab] that sort by logit and, among equals, by the lower id first when
    descending.

    The high half is the float's bits mapped to integers of the same order, the low half the complement of the
    id: no two keys are equal, so every selection algorithm picks the same ids.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ordered << 32) + (_ID_MASK - torch.arange(logits.shape[1]))


def ids_of(keys: Tensor) -> Tensor:
    """The vocabulary ids within keys of `rank_keys`."""
    return _ID_MASK - (keys & _ID_MASK)


def draw_filtered(edited: Tensor, scaled: Tensor, params: list[SamplingParams], keys: DrawKeys) -> Tensor:
    """Token ids [n] for rows with a filter: `edited` fp32 logits, `scaled` the same in fp64 over the
    temperature.
    """
    vocab_size = edited.shape[1]
    limits = torch.tensor(
        [[p.top_k if p.top_k > 0 else vocab_size, p.top_p, p.min_p] for p in params]
    ).double()
    limits[:, 1:] = torch.tensor([[p.top_p, p.min_p] for p in params], dtype=torch.float64)
    tokens, is_decided = _draw_among(edited, scaled, limits, keys, min(_CANDIDATES, vocab_size))
    open_rows = (~is_decided).nonzero().flatten()
    if open_rows.numel():
        tokens[open_rows] = _draw_among(
            edited[open_rows], scaled[open_rows], limits[open_rows], keys.select(open_rows), vocab_size
        )[0]
    return tokens


def _draw_among(
    edited: Tensor, scaled: Tensor, limits: Tensor, keys: DrawKeys, width: int
) -> tuple[Tensor, Tensor]:
    """(token ids, whether `width` candidates decided the row). limits [n, 3]: top_k, top_p, min_p."""
    top_k, top_p, min_p = limits[:, :1], limits[:, 1:2], limits[:, 2:3]
    ids = ids_of(rank_keys(edited).topk(width, dim=-1).values)
    values = scaled.gather(1, ids)
    weights = (values - values[:, :1]).exp()
    is_kept = (weights >= min_p) & (torch.arange(width)[None, :] < top_k)
    weights = weights * is_kept
    cumulative = weights.cumsum(-1)
    # The mass that top_p shares out: what min_p and top_k left. When neither ends within the candidates it is
    # the whole vocabulary's.
    is_short = is_kept[:, -1:] & (width < edited.shape[1]) & (top_k > width)
    total = torch.where(is_short, _row_mass(scaled, values[:, :1], min_p), cumulative[:, -1:])
    is_kept &= (cumulative - weights) < top_p * total
    is_decided = ~(is_kept[:, -1] & is_short[:, 0])
    noisy = (values + gumbel(keys.words_of(ids))).masked_fill_(~is_kept, float("-inf"))
    return ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(1), is_decided


def _row_mass(scaled: Tensor, highest: Tensor, min_p: Tensor) -> Tensor:
    """Sum of exp(scaled - highest) over the ids that min_p keeps, [n, 1]. A lone row is doubled: see
    row_mean_square.
    """
    weights = (scaled - highest).exp()
    weights = weights * (weights >= min_p)
    return (
        weights.expand(2, -1).sum(-1, keepdim=True)[:1]
        if weights.shape[0] == 1
        else weights.sum(-1, keepdim=True)
    )
