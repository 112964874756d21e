"""Three models on one held-out text, block by block: the source, plain rounding, and what the search made.

Hidden states of all three advance together, so no model is ever whole in memory. Perplexity is exp of the
mean negative log likelihood per predicted token; mean KL is KL(source || quantized) in nats per predicted
token; greedy agreement is how often both would pick the same next token. Each comes with a bootstrap
interval over windows. This module does not know how weights are chosen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.quantizer.bootstrap import LEVEL, Bootstrap
from services.quantizer.errors import QuantizerError
from services.quantizer.source import Head, Source, Weights

VARIANTS = ("source", "rounding", "chosen")
TOKENS_PER_CHUNK = 512
LOGITS_PER_CHUNK = 8 << 20  # of one variant: 32 MiB; some six such tensors are alive at once
_MAX_LIKELIHOOD = 700.0  # exp of more is infinite


class Evaluation:
    """`token_ids` int64 [windows, length]; `hidden` is where an earlier evaluation of them was.

    Attributes:
        hidden: of each variant fp32 [windows, length, hidden_size], behind the blocks so far.
    """

    def __init__(self, source: Source, token_ids: Tensor, hidden: dict[str, Tensor] | None = None) -> None:
        self._source, self._token_ids = source, token_ids
        if hidden is None:
            embedded = source.embed(token_ids)
            hidden = {variant: embedded.clone() for variant in VARIANTS}
        self.hidden = hidden

    def advance(self, layer: nn.Module, variant: str, weights: Weights) -> None:
        """Take one variant through a block with its weights."""
        self._source.run_block(layer, weights, self.hidden[variant], in_place=True)

    def finish(self, head: Head) -> dict[str, Any]:
        """Read the three streams out through the head: the quality section of the manifest."""
        measured = {variant: _Sums(*sums) for variant, sums in self._measure(head).items()}
        count = self._token_ids[:, 1:].numel()
        for variant, sums in measured.items():
            if not np.isfinite(sums.likelihood + sums.divergence).all():
                raise QuantizerError(f"evaluation: the {variant} model's outputs are not finite")
        return {
            "tokens": self._token_ids.numel(),
            "predicted_tokens": count,
            "windows": len(self._token_ids),
            **_figures(measured, count),
            "intervals": _intervals(measured, count),
        }

    def _measure(self, head: Head) -> dict[str, tuple[NDArray[np.float64], ...]]:
        """Per variant: log likelihood, divergence and agreement, float64 [windows] each."""
        targets = self._token_ids[:, 1:].reshape(-1)
        streams = [self.hidden[v].flatten(0, 1) for v in VARIANTS]
        # Rows of hidden states that predict: all but each window's last.
        rows = torch.arange(self._token_ids.numel()).view_as(self._token_ids)[:, :-1].reshape(-1)
        tokens = torch.empty(len(VARIANTS), 3, targets.numel())
        step = max(1, min(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // self._source.vocab_size))
        for begin in range(0, targets.numel(), step):
            chunk = slice(begin, begin + step)
            # One call for all three: widening the projection costs more than a small chunk's product.
            logits = head.logits(torch.cat([stream[rows[chunk]] for stream in streams]))
            parts = torch.log_softmax(logits, -1).split(len(targets[chunk]))
            del logits
            tokens[:, :, chunk] = _compare(parts, targets[chunk].to(parts[0].device)).to(tokens.device)
        windows = len(self._token_ids)
        sums = tokens.view(len(VARIANTS), 3, windows, -1).sum(-1, dtype=torch.float64).numpy()
        return {variant: tuple(sums[index]) for index, variant in enumerate(VARIANTS)}


class _Sums:
    """Of one variant, float64 [windows] each."""

    def __init__(self, likelihood: Any, divergence: Any, agreement: Any) -> None:
        self.likelihood, self.divergence, self.agreement = likelihood, divergence, agreement


def _compare(parts: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """[variants, 3, tokens] of log probabilities [tokens, vocabulary] per variant, the source's first."""
    log_p = parts[0]
    best, rows = log_p.argmax(-1), []
    for log_q in parts:
        likelihood = log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if log_q is log_p:
            rows.append(torch.stack([likelihood, torch.zeros_like(likelihood), torch.ones_like(likelihood)]))
            continue
        divergence = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        rows.append(torch.stack([likelihood, divergence, (log_q.argmax(-1) == best).float()]))
    return torch.stack(rows)


def _figures(measured: dict[str, _Sums], count: int) -> dict[str, dict[str, float]]:
    quality: dict[str, dict[str, float]] = {}
    source = measured["source"].likelihood.sum()
    for variant, sums in measured.items():
        likelihood = sums.likelihood.sum()
        quality[variant] = {"perplexity": _short(_perplexity(likelihood / count))}
        if variant != "source":
            increase = math.expm1(min((source - likelihood) / count, _MAX_LIKELIHOOD))
            quality[variant]["perplexity_increase"] = _short(increase)
            quality[variant]["mean_kl"] = _short(sums.divergence.sum() / count)
            quality[variant]["greedy_agreement"] = _short(sums.agreement.sum() / count)
    return quality


def _intervals(measured: dict[str, _Sums], count: int) -> dict[str, Any] | None:
    """The same keys, each with [low, high]; None where the windows are too few. All windows are equally
    long, so that a drawn mean is a drawn sum over `count`.
    """
    draws = Bootstrap(len(measured["source"].likelihood))
    source = measured["source"].likelihood
    result: dict[str, Any] = {"level": LEVEL}
    for variant, sums in measured.items():
        found = {"perplexity": draws.interval([sums.likelihood], lambda total: _exp(-total / count))}
        if variant != "source":
            found["perplexity_increase"] = draws.interval(
                [source, sums.likelihood], lambda p, q: _exp((p - q) / count) - 1
            )
            found["mean_kl"] = draws.interval([sums.divergence], lambda total: total / count)
            found["greedy_agreement"] = draws.interval([sums.agreement], lambda total: total / count)
        if any(bounds is None for bounds in found.values()):
            return None
        result[variant] = {key: [_short(bound) for bound in bounds or []] for key, bounds in found.items()}
    return result


def _exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(values, _MAX_LIKELIHOOD))


def _perplexity(likelihood: float) -> float:
    return math.exp(min(-likelihood, _MAX_LIKELIHOOD))


def _short(value: float) -> float:
    """Seven significant digits: more would be noise that only looks like information."""
    return float(f"{value:.7g}")
