"""What a decoder layer of `transformers` is told besides its hidden states: angles of the rotary embedding,
and a mask where the attention would not be right without one.

This module does not know weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from services.quantizer.model_map import Architecture

_MAX_MASKS = 8
"""Calibration, canary and evaluation have a length each."""


class Positions:
    """For windows of text that are whole and begin at position 0."""

    def __init__(self, architecture: Architecture, config: Any, rotary: nn.Module) -> None:
        self._architecture, self._config, self._rotary = architecture, config, rotary
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def arguments(self, index: int, batch: Tensor) -> dict[str, Any]:
        """Keyword arguments of layer `index` for `batch` [windows, length, hidden]."""
        ids = torch.arange(batch.shape[1], device=batch.device).unsqueeze(0)
        rotary = self._rotary.to(batch.device)
        by_type = (self._config.layer_types[index],) if self._architecture.has_rotary_per_type else ()
        return {
            "position_embeddings": rotary(batch, ids, *by_type),
            "position_ids": ids,
            "attention_mask": self._mask(batch, self.window(index)),
        }

    def window(self, index: int) -> int | None:
        """How many tokens, itself among them, a token of the layer sees; None means all before it."""
        is_sliding = self._architecture.windows == "all" or (
            self._architecture.windows == "by type" and self._config.layer_types[index] == "sliding_attention"
        )
        return self._config.sliding_window if is_sliding else None

    def _mask(self, batch: Tensor, window: int | None) -> Tensor | None:
        """[1, 1, length, length]. Without one, sdpa attention is causal and eager attention sees all."""
        length = batch.shape[1]
        is_eager = self._architecture.attention == "eager"
        if window is not None and window >= length:
            window = None
        if window is None and not is_eager:
            return None
        key = (length, window)
        if key not in self._masks:
            if len(self._masks) == _MAX_MASKS:
                self._masks.clear()
            self._masks[key] = _window_mask(batch, window, is_eager)
        return self._masks[key]


def _window_mask(batch: Tensor, window: int | None, is_eager: bool) -> Tensor:
    """True where a row may look; for eager attention, what is added to the scores."""
    ids = torch.arange(batch.shape[1], device=batch.device)
    behind = ids.unsqueeze(1) - ids
    is_seen = behind >= 0
    if window is not None:
        is_seen &= behind < window
    if is_eager:
        return torch.zeros_like(is_seen, dtype=batch.dtype).masked_fill_(
            ~is_seen, torch.finfo(batch.dtype).min
        )[None, None]
    return is_seen[None, None]
