"""Which windows calibrate: duplicates dropped, shares by weight, drawn by the seed. Knows only token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from services.quantizer.calibration import Ids, choose, paragraphs_on_one_line

MIN_PARAGRAPH_CHARS = 80
"""A shorter paragraph may come again: it is a heading, or what people say."""


class Unique:
    """Remembers what it has seen, over all files, in 16 bytes each."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, data: bytes) -> bool:
        """Whether `data` is seen for the first time."""
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True

    def paragraphs(self, text: str) -> tuple[str, int]:
        """Plain text without the long paragraphs that were there before, and how many that were."""
        every = paragraphs_on_one_line(text).split("\n\n")
        kept = [p for p in every if len(p) < MIN_PARAGRAPH_CHARS or self.is_new(p.encode())]
        return "\n\n".join(kept), len(every) - len(kept)

    def documents(self, texts: Iterable[str]) -> tuple[list[str], int]:
        """Documents without those that were there before, and how many that were."""
        every = list(texts)
        kept = [text for text in every if self.is_new(text.encode())]
        return kept, len(every) - len(kept)

    def windows(self, found: Ids) -> tuple[Ids, int]:
        """Rows of ids without those that were there before, and how many that were."""
        kept = found[[self.is_new(row.tobytes()) for row in found]] if len(found) else found
        return kept, len(found) - len(kept)


def select(parts: Sequence[Ids], weights: Sequence[float | None], wanted: int, seed: int) -> list[list[int]]:
    """Indices of the windows taken from each part. Without any weight all windows are alike; with one, parts
    give by weight (1 where none was given), and what one part lacks the others give.
    """
    counts = [len(part) for part in parts]
    if all(weight is None for weight in weights):
        bounds = np.cumsum([0, *counts])
        taken = choose(int(bounds[-1]), wanted, seed)
        return [[i - int(begin) for i in taken if begin <= i < end] for begin, end in pairwise(bounds)]
    given = shares([1.0 if weight is None else weight for weight in weights], counts, wanted)
    return [choose(count, n, f"{seed}/{i}") for i, (count, n) in enumerate(zip(counts, given, strict=True))]


def shares(weights: Sequence[float], counts: Sequence[int], wanted: int) -> list[int]:
    """How many of each part, by weight and largest remainder, never more than it has."""
    given = [0] * len(counts)
    while True:
        left = min(wanted, sum(counts)) - sum(given)
        having = [i for i, count in enumerate(counts) if given[i] < count]
        if left <= 0:
            return given
        total = sum(weights[i] for i in having)
        exact = {i: left * weights[i] / total for i in having}
        more = {i: int(exact[i]) for i in having}
        by_remainder = sorted(having, key=lambda i: (more[i] - exact[i], i))
        for i in by_remainder[: left - sum(more.values())]:
            more[i] += 1
        for i in having:
            given[i] = min(counts[i], given[i] + more[i])
