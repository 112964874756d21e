"""Philox4x32-10: the published known answers, a twin in plain integers, and what each key part changes."""

from __future__ import annotations

import math

import pytest
import torch

from services.engine.runner.philox import DrawKeys, gumbel, philox4x32

MASK = 0xFFFFFFFF


def _twin(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


# Random123's kat_vectors, philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert _twin(counter, key) == expected
    words = philox4x32(
        tuple(torch.tensor([c]) for c in counter), (torch.tensor([key[0]]), torch.tensor([key[1]]))
    )
    assert tuple(int(word) for word in words) == expected


def test_words_are_the_twins() -> None:
    seeds, indices, offsets = [0, 2**64 - 1, 0x0123456789ABCDEF], [0, 7, MASK], [5, 0, 1000]
    words = DrawKeys(seeds, indices, offsets).all_words(13)
    assert words.shape == (3, 13)
    for row in range(3):
        key = (seeds[row] & MASK, seeds[row] >> 32)
        for token in range(13):
            expected = _twin((token // 4, offsets[row], indices[row], 0), key)[token % 4]
            assert int(words[row, token]) == expected


def test_some_ids_and_some_rows_are_cut_from_the_whole() -> None:
    keys = DrawKeys([11, 12, 13], [0, 1, 2], [3, 4, 5])
    whole = keys.all_words(4099)
    ids = torch.tensor([[4098, 0, 77], [3, 2, 1], [1024, 5, 4097]])
    assert torch.equal(keys.words_of(ids), whole.gather(1, ids))
    rows = torch.tensor([2, 0])
    assert torch.equal(keys.select(rows).all_words(4099), whole[rows])
    alone = torch.cat([keys.select(torch.tensor([row])).all_words(4099) for row in range(3)])
    assert torch.equal(alone, whole)


def test_gumbel_noise_is_finite_and_of_the_right_shape() -> None:
    extremes = gumbel(torch.tensor([[0, MASK]]))
    assert bool(torch.isfinite(extremes).all())
    noise = gumbel(DrawKeys([1], [0], [0]).all_words(200_000))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_gumbel_of_a_row_alone_has_the_same_bits() -> None:
    words = DrawKeys(list(range(9)), [0] * 9, [1] * 9).all_words(1001)
    assert torch.equal(torch.cat([gumbel(words[row : row + 1]) for row in range(9)]), gumbel(words))
