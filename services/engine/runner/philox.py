"""Philox4x32-10, the counter-based generator that keys every draw (Salmon et al., SC'11, doi
10.1145/2063384.2063405).

A word is a pure function of (seed, sample index, completion offset, vocabulary id): the same request draws
the same noise in any batch, after a preemption, on another engine. Knows nothing of logits.

Counter: (vocabulary id // 4, completion offset, sample index, 0); key: the seed's low and high 32 bits;
vocabulary id i takes output word i % 4. Plain int64 arithmetic: a 32 x 32 bit product wraps modulo 2^64, and
both of its halves survive that.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds on int64 tensors that hold 32-bit values; c0 has the shape that all broadcast to."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1 ^ k0)
        c2 = (product0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3 ^ k1)
        c1, c3 = product1.bitwise_and_(_MASK), product0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


class DrawKeys:
    """The keys of a batch of draws, one per row: seed (unsigned 64 bit), sample index, completion offset."""

    def __init__(self, seeds: list[int], sample_indices: list[int], offsets: list[int]) -> None:
        columns = zip(seeds, sample_indices, offsets, strict=True)
        self._words = torch.tensor(
            [[seed & _MASK, seed >> 32 & _MASK, i & _MASK, o & _MASK] for seed, i, o in columns]
        )

    def select(self, rows: Tensor) -> DrawKeys:
        """The keys of some rows."""
        selected = DrawKeys.__new__(DrawKeys)
        selected._words = self._words[rows]
        return selected

    def all_words(self, vocab_size: int) -> Tensor:
        """int64 [rows, vocab]: one 32-bit word per vocabulary id."""
        groups = torch.arange(-(-vocab_size // 4))[None, :]
        words = self._generate(groups.expand(self._words.shape[0], -1))
        return torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]

    def words_of(self, token_ids: Tensor) -> Tensor:
        """int64 like `token_ids` [rows, k]: the words of some vocabulary ids."""
        words = torch.stack(self._generate(token_ids >> 2), dim=-1)
        return words.gather(-1, (token_ids & 3).unsqueeze(-1)).squeeze(-1)

    def _generate(self, groups: Tensor) -> Words:
        low, high, indices, offsets = self._words[:, :, None].unbind(1)
        return philox4x32(
            (groups, offsets, indices.expand_as(groups), torch.zeros_like(offsets)), (low, high)
        )


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, fp64, from 32-bit words: -log(-log((word + 1/2) / 2^32)); always finite."""
    return words.double().add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_()
