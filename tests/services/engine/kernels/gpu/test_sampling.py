"""Tokens drawn on the device against the CPU's sampler, whose semantics are the law.

The device computes in fp32, the CPU in fp64, so draws whose outcome hangs on less than that may differ: two
best scores within 1e-4, or an id within 1e-6 of the edge of min_p or top_p. The tests look for those, leave
them out and see to it that they are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from services.engine.core.sequence import SamplingParams
from services.engine.kernels.gpu.sampling import PARAM_WORDS, draw
from services.engine.runner.filters import draw_top_k, draw_top_p, rank_keys
from services.engine.runner.philox import DrawKeys, gumbel


@dataclass
class Row:
    """The parameters of one draw."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    index: int = 0
    offset: int = 0

    def has_filter(self, vocab: int) -> bool:
        return 0 < self.top_k < vocab or self.top_p < 1 or self.min_p > 0


def _params(rows: list[Row], extra: int = 0) -> Tensor:
    """int32 [rows + extra, PARAM_WORDS]; the extra rows hold NaN and nonsense."""
    floats = torch.tensor([[r.temperature, r.top_p, r.min_p] for r in rows], dtype=torch.float32)
    temperature, top_p, min_p = floats.view(torch.int32).unbind(1)
    whole = torch.tensor([[r.top_k, r.seed & 0xFFFFFFFF, r.seed >> 32, r.index, r.offset] for r in rows])
    whole = torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)
    top_k, low, high, index, offset = whole.unbind(1)
    params = torch.stack((temperature, top_k, top_p, min_p, low, high, index, offset), dim=1)
    return torch.cat((params, torch.full((extra, PARAM_WORDS), 0x7FC00001, dtype=torch.int32)))


def _draw(
    logits: Tensor, rows: list[Row], device: str, *, has_filters: bool | None = None, extra: int = 0
) -> tuple[list[int], list[int]]:
    """Tokens and statuses from the device; what lies beyond the rows must not be written."""
    count = len(rows)
    if has_filters is None:
        has_filters = any(row.has_filter(logits.shape[1]) for row in rows)
    token_ids = torch.full((count + 2,), -7, dtype=torch.int64, device=device)
    status = torch.full((count + 2,), -7, dtype=torch.int32, device=device)
    draw(
        logits.to(device),
        _params(rows, extra).to(device),
        has_filters=has_filters,
        token_ids=token_ids,
        status=status,
    )
    assert token_ids[count:].tolist() == [-7, -7]
    assert status[count:].tolist() == [-7, -7]
    return token_ids[:count].tolist(), status[:count].tolist()


def _cpu_token(logits: Tensor, row: Row) -> int:
    """The CPU's token for fp32 logits [vocab]."""
    if row.temperature == 0:
        return int(logits.argmax())
    edited = logits[None]
    scaled = edited.double() / row.temperature
    keys = DrawKeys([row.seed], [row.index], [row.offset])
    params = [
        SamplingParams(
            max_tokens=1, temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p
        )
    ]
    if 0 < row.top_k < len(logits):
        return int(draw_top_k(edited, scaled, params, keys))
    if row.has_filter(len(logits)):
        return int(draw_top_p(edited, scaled, params, keys))
    return int((gumbel(keys.all_words(len(logits))) + scaled).argmax())


def _is_clear(logits: Tensor, row: Row) -> bool:
    """Whether the draw's outcome hangs on more than fp32 can tell."""
    if row.temperature == 0:
        return True
    order = rank_keys(logits[None])[0].argsort(descending=True)
    scaled = logits.double()[order] / row.temperature
    weights = (scaled - scaled[0]).exp()
    is_kept = weights >= row.min_p
    if row.min_p > 0 and float(((weights / row.min_p) - 1).abs().masked_fill(weights == 1, 1).min()) < 1e-6:
        return False
    if row.top_k:
        is_kept &= torch.arange(len(logits)) < row.top_k
    weights = weights * is_kept
    shares = (weights.cumsum(0) - weights) / weights.sum()
    if row.top_p < 1:
        if float((shares[is_kept] - row.top_p).abs().min()) < 1e-6:
            return False
        is_kept &= shares < row.top_p
    noise = gumbel(DrawKeys([row.seed], [row.index], [row.offset]).words_of(order[None]))[0]
    best = (scaled + noise)[is_kept].topk(min(2, int(is_kept.sum()))).values
    return len(best) < 2 or float(best[0] - best[1]) > 1e-4


def _compare(logits: Tensor, rows: list[Row], device: str, batch: int = 6) -> None:
    """Draw for every row on the device, `batch` at once, and compare the tokens that must be equal."""
    unclear = 0
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        found, status = _draw(logits[first : first + batch], some, device)
        assert not any(status)
        for i, (row, token) in enumerate(zip(some, found, strict=True)):
            if _is_clear(logits[first + i], row):
                assert token == _cpu_token(logits[first + i], row), row
            else:
                unclear += 1
    assert unclear <= max(1, len(rows) // 100)


def _logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("vocab", [1, 7, 100, 1000, 5003])
def test_unfiltered_tokens_are_those_of_the_cpu(vocab: int, device: str) -> None:
    count = 60
    temperatures = [0.0, 1e-3, 0.3, 1.0, 10.0]
    rows = [
        Row(temperatures[i % 5], seed=(i * 0x9E3779B97F4A7C15) % 2**64, index=i % 3, offset=i * i)
        for i in range(count)
    ]
    _compare(_logits(count, vocab), rows, device)


_FILTERS = {
    "top_k": [{"top_k": k} for k in (1, 2, 5, 50)],
    "top_p": [{"top_p": p} for p in (1e-6, 0.3, 0.9, 0.999)],
    "min_p": [{"min_p": p} for p in (1.0, 0.5, 0.02, 1e-7)],
    "all": [
        {"top_k": 20, "top_p": 0.95},
        {"top_k": 7, "top_p": 0.6, "min_p": 0.01},
        {"top_p": 0.8, "min_p": 0.05},
        {},
    ],
}


@pytest.mark.parametrize("filters", list(_FILTERS))
@pytest.mark.parametrize("vocab", [7, 100, 1000, 5003])
def test_filtered_tokens_are_those_of_the_cpu(vocab: int, filters: str, device: str) -> None:
    some = _FILTERS[filters]
    temperatures = [1.0, 0.3, 10.0, 1e-3, 0.0]
    rows = [
        Row(temperatures[i // 4 % 5], seed=i * 7919, index=i % 3, offset=i, **some[i % 4]) for i in range(20)
    ]
    _compare(_logits(20, vocab, seed=vocab), rows, device)
