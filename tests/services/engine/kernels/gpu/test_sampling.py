"""Tokens drawn on the device against the CPU's sampler, whose semantics are the law.

The device computes in fp32, the CPU in fp64, so draws whose outcome hangs on less than that may differ: two
best scores within 1e-4, or the best id within 1e-6 of the edge of min_p or top_p. The tests look for those,
leave them out and see to it that they are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from services.engine.core.sequence import SamplingParams
from services.engine.kernels.gpu import sampling_filters
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
    """Whether the draw's outcome hangs on no more than fp32 can tell: the best of all ids that may be kept is
    best by 1e-4, and is surely kept.
    """
    if row.temperature == 0:
        return True
    order = rank_keys(logits[None])[0].argsort(descending=True)
    scaled = logits.double()[order] / row.temperature
    weights = (scaled - scaled[0]).exp()
    may = weights >= row.min_p * (1 - 1e-6)
    must = (weights >= row.min_p * (1 + 1e-6)) | (weights == 1)
    if row.top_k:
        may &= torch.arange(len(logits)) < row.top_k
        must &= torch.arange(len(logits)) < row.top_k
    weights = weights * must
    shares = (weights.cumsum(0) - weights) / weights.sum()
    if row.top_p < 1:
        may &= shares < row.top_p + 1e-6
        must &= (shares < row.top_p - 1e-6) | (torch.arange(len(logits)) == 0)
    noise = gumbel(DrawKeys([row.seed], [row.index], [row.offset]).words_of(order[None]))[0]
    best = (scaled + noise).masked_fill(~may, -float("inf")).topk(min(2, len(logits)))
    gap = float(best.values[0] - best.values[-1]) if len(logits) > 1 else 1.0
    return gap > 1e-4 and bool(must[best.indices[0]])


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


_FILTERS = [
    {"top_k": 1},
    {"top_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"top_k": 20, "top_p": 0.95},
    {"top_k": 7, "top_p": 0.6, "min_p": 0.01},
    {"top_p": 0.8, "min_p": 0.05},
    {"top_k": 50},
    {"top_p": 0.999},
    {"min_p": 1e-7},
    {},
]


def _rows(count: int, filters: list[dict[str, float]]) -> list[Row]:
    """Rows that go through all filters at one temperature, then at the next."""
    temperatures = [1.0, 0.3, 10.0, 1e-3, 0.0]
    return [
        Row(
            temperatures[i // len(filters) % 5],
            seed=(i * 0x9E3779B97F4A7C15) % 2**64,
            index=i % 3,
            offset=i * i,
            **filters[i % len(filters)],
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(("vocab", "count"), [(1, 5), (7, 15), (100, 15), (5003, 10)])
def test_unfiltered_tokens_are_those_of_the_cpu(vocab: int, count: int, device: str) -> None:
    _compare(_logits(count, vocab), _rows(count, [{}, {}]), device)


@pytest.mark.parametrize(("vocab", "count"), [(7, 26), (100, 39), (5003, 13)])
def test_filtered_tokens_are_those_of_the_cpu(vocab: int, count: int, device: str) -> None:
    _compare(_logits(count, vocab, seed=vocab), _rows(count, _FILTERS), device)


@pytest.mark.parametrize(("slots", "count"), [(32, 13), (64, 13)])
def test_rows_with_more_candidates_than_room_are_searched_in_memory(
    slots: int, count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_filters, "_SLOTS", slots)
    monkeypatch.setattr(sampling_filters, "_SHARE", 64)
    monkeypatch.setattr(sampling_filters, "_LOOP_TILE", 256)
    _compare(_logits(count, 600, seed=slots), _rows(count, _FILTERS), device)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [7, 100, 1000, 5003])
def test_many_tokens_are_those_of_the_cpu(vocab: int, device: str) -> None:
    _compare(_logits(200, vocab, seed=vocab + 1), _rows(200, _FILTERS), device)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_tokens_of_a_large_vocabulary_are_those_of_the_cpu(scale: float, device: str) -> None:
    count = len(_FILTERS)
    _compare(_logits(count, 131072, seed=7, scale=scale), _rows(count, _FILTERS), device)


def test_among_equal_logits_the_lowest_ids_are_kept(device: str) -> None:
    levels = torch.tensor([0.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    duplicated = levels[torch.randint(0, 6, (2, 300), generator=torch.Generator().manual_seed(1))]
    flat = torch.full((4, 300), -2.5)
    signed_zeros = torch.tensor([0.0, -0.0]).repeat(150).expand(4, 300)
    logits = torch.cat((flat, signed_zeros, duplicated.repeat_interleave(4, dim=0)))
    filters = [{"top_k": 3}, {"top_p": 0.013}, {"min_p": 1.0}, {"top_k": 40, "top_p": 0.5}]
    for seed in range(3):
        rows = [Row(seed=seed * 100 + i, **filters[i % 4]) for i in range(len(logits))]
        found, _ = _draw(logits, rows, device)
        assert found == [_cpu_token(line, row) for line, row in zip(logits, rows, strict=True)]


def test_greedy_rows_take_the_lowest_of_the_largest(device: str) -> None:
    logits = torch.zeros(3, 2500)
    logits[1, [2100, 700, 2400]] = 5.0
    logits[2] = -float("inf")
    logits[2, 1999] = -1e30
    rows = [Row(0.0), Row(0.0, top_p=0.5), Row(0.0, top_k=2)]
    assert _draw(logits, rows, device) == ([0, 700, 1999], [0, 0, 0])


def test_banned_ids_are_not_drawn(device: str) -> None:
    logits = _logits(6, 500, seed=5)
    logits[:, torch.randperm(500, generator=torch.Generator().manual_seed(6))[:495]] = -float("inf")
    filters = [{}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 1e-7}, {"top_k": 6, "top_p": 0.9}, {}]
    rows = [Row(5.0, seed=i, **some) for i, some in enumerate(filters)]
    found, status = _draw(logits, rows, device)
    assert status == [0] * 6
    assert found == [_cpu_token(line, row) for line, row in zip(logits, rows, strict=True)]
    assert all(logits[i, token] > -float("inf") for i, token in enumerate(found))


@pytest.mark.parametrize("has_filters", [False, True])
def test_rows_that_are_not_finite_are_told_and_touch_no_other(has_filters: bool, device: str) -> None:
    infinity, nan = float("inf"), float("nan")
    logits = _logits(6, 1100, seed=8)
    logits[0, 1050] = nan
    logits[2, 3] = infinity
    logits[3] = -infinity
    logits[5, 17] = -nan
    rows = [Row(0.7, seed=i, top_p=0.9 if has_filters else 1.0) for i in range(6)]
    rows[5].temperature = 0.0
    found, status = _draw(logits, rows, device)
    assert status == [1, 0, 1, 1, 0, 1]
    assert found == [0, _cpu_token(logits[1], rows[1]), 0, 0, _cpu_token(logits[4], rows[4]), 0]


def test_rows_are_independent(device: str, poison_empty: None) -> None:
    """Alone, in a batch, strided, with nonsense beyond the rows, filters in other rows: the same tokens."""
    wide = _logits(4, 1500, seed=9)
    logits = wide[:, 10:1210]
    rows = [Row(1.0, seed=1), Row(0.8, top_p=0.9, seed=2), Row(2.0, seed=3), Row(1.0, top_k=9, seed=4)]
    together = _draw(logits, rows, device, extra=2)
    assert together[1] == [0] * 4
    for i, row in enumerate(rows):
        alone = _draw(logits[i : i + 1].clone(), [row], device)
        assert (alone[0][0], alone[1][0]) == (together[0][i], together[1][i])


@pytest.mark.slow
def test_draws_have_the_distribution_they_should(device: str) -> None:
    """Chi-square; a draw takes the interpreter 50 ms, hence fewer there."""
    probabilities = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02])
    logits = probabilities.log()
    count = 20_000 if device == "cuda" else 1500
    rows = [Row(seed=123, offset=i) for i in range(count)]
    found, _ = _draw(logits.expand(count, -1), rows, device)
    observed = torch.bincount(torch.tensor(found), minlength=8).double()
    expected = probabilities.double() * count
    assert float(((observed - expected) ** 2 / expected).sum()) < 24.3  # 7 degrees of freedom, p = 0.001


def test_no_rows_are_no_launch(device: str) -> None:
    nothing = torch.empty(0, device=device)
    draw(
        nothing.view(0, 8),
        nothing.view(0, PARAM_WORDS).int(),
        has_filters=True,
        token_ids=nothing.long(),
        status=nothing.int(),
    )


def test_what_does_not_fit_is_refused(device: str) -> None:
    logits = torch.zeros(2, 8, device=device)
    params = _params([Row(), Row()]).to(device)
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    status = torch.zeros(2, dtype=torch.int32, device=device)
    for bad in (
        {"logits": logits.half()},
        {"logits": logits.t()},
        {"logits": torch.zeros(2, 0, device=device)},
        {"params": params[:1]},
        {"params": params[:, :7]},
        {"params": params.float()},
        {"token_ids": ids[:1]},
        {"token_ids": ids.int()},
        {"status": status.long()},
        {"status": status[:, None]},
    ):
        tensors = {"logits": logits, "params": params, "token_ids": ids, "status": status} | bad
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            draw(
                tensors["logits"],
                tensors["params"],
                has_filters=False,
                token_ids=tensors["token_ids"],
                status=tensors["status"],
            )
