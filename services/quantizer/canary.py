"""The canary: some prompts, and what the quantized model answers to them in fp32.

An engine has model code of its own; replaying the canary after loading compares two implementations on the
very bytes that will be served. How far an engine's arithmetic may stray is the engine's to say. This module
does not know any engine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.quantizer.source import Head, Source, Weights
from weft.artifact.manifest import Canary, CanaryPrompt

NUM_PROMPTS = 4
PROMPT_LENGTH = 48


class CanaryRecorder:
    """Carries a few prompts through the quantized blocks.

    Attributes:
        hidden: fp32 [prompts, length, hidden_size], behind the blocks so far.
    """

    def __init__(self, source: Source, windows: Tensor, hidden: Tensor | None = None) -> None:
        """`windows` int64 [n, length]: the prompts are the beginnings of evenly spaced ones. `hidden` is
        where an earlier recorder of the same prompts was.
        """
        stride = max(1, windows.shape[0] // NUM_PROMPTS)
        self._source = source
        self._token_ids = windows[::stride][:NUM_PROMPTS, :PROMPT_LENGTH].clone()
        self.hidden = source.embed(self._token_ids) if hidden is None else hidden

    def advance(self, layer: nn.Module, weights: Weights) -> None:
        """Through one block with the weights of the artifact."""
        self._source.run_block(layer, weights, self.hidden, in_place=True)

    def finish(self, head: Head) -> Canary:
        """Most likely next token, its log probability and its lead, at every position."""
        return Canary(
            tuple(
                _answer(ids, head.logits(h).cpu())
                for ids, h in zip(self._token_ids, self.hidden, strict=True)
            )
        )


def _answer(token_ids: Tensor, logits: Tensor) -> CanaryPrompt:
    best, expected = logits.topk(2, dim=-1)
    logprobs = torch.log_softmax(logits, -1).gather(-1, expected[:, :1]).squeeze(-1)
    return CanaryPrompt(
        tuple(token_ids.tolist()),
        tuple(expected[:, 0].tolist()),
        tuple(round(value, 6) for value in logprobs.tolist()),
        tuple(round(value, 6) for value in (best[:, 0] - best[:, 1]).tolist()),
    )
