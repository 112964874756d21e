"""Three models on one held-out text, block by block: the source, plain rounding, and what the search made.

Hidden states of all three advance together, so no model is ever whole in memory. Perplexity is exp of the
mean negative log likelihood per predicted token; mean KL is KL(source || quantized) in nats per predicted
token; greedy agreement is how often both would pick the same next token. This module does not know how
weights are chosen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from services.quantizer.source import Head, Source, Weights

VARIANTS = ("source", "rounding", "chosen")
_TOKENS_PER_CHUNK = 512


class Evaluation:
    """`token_ids` int64 [windows, length]."""

    def __init__(self, source: Source, token_ids: Tensor) -> None:
        self._source, self._token_ids = source, token_ids
        embedded = source.embed(token_ids)
        self._hidden = dict.fromkeys(VARIANTS, embedded)

    def advance(self, layer: nn.Module, variant: str, weights: Weights) -> None:
        """Take one variant through a block with its weights."""
        self._hidden[variant] = self._source.run_block(layer, weights, self._hidden[variant])

    def finish(self, head: Head) -> dict[str, Any]:
        """Read the three streams out through the head: the quality section of the manifest."""
        likelihood = dict.fromkeys(VARIANTS, 0.0)
        divergence = dict.fromkeys(VARIANTS, 0.0)
        agreement = dict.fromkeys(VARIANTS, 0)
        targets = self._token_ids[:, 1:].reshape(-1)
        streams = {v: h[:, :-1].reshape(-1, h.shape[-1]) for v, h in self._hidden.items()}
        for begin in range(0, targets.numel(), _TOKENS_PER_CHUNK):
            chunk = slice(begin, begin + _TOKENS_PER_CHUNK)
            log_p = torch.log_softmax(head.logits(streams["source"][chunk]), -1)
            picks = targets[chunk].to(log_p.device).unsqueeze(-1)
            for variant in VARIANTS:
                log_q = log_p
                if variant != "source":
                    log_q = torch.log_softmax(head.logits(streams[variant][chunk]), -1)
                likelihood[variant] += float(log_q.gather(-1, picks).sum(dtype=torch.float64))
                divergence[variant] += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
                agreement[variant] += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count = targets.numel()
        quality: dict[str, Any] = {"tokens": self._token_ids.numel(), "predicted_tokens": count}
        for variant in VARIANTS:
            quality[variant] = {"perplexity": _short(math.exp(min(-likelihood[variant] / count, 700.0)))}
            if variant != "source":
                quality[variant]["mean_kl"] = _short(divergence[variant] / count)
                quality[variant]["greedy_agreement"] = _short(agreement[variant] / count)
        return quality


def _short(value: float) -> float:
    """Seven significant digits: more would be noise that only looks like information."""
    return float(f"{value:.7g}")
