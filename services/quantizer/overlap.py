"""Whether the calibration text holds what the evaluation text does: then the evaluation would flatter.

Both are read as words, without case, punctuation, line breaks and ways to encode a letter, so that another
wrapping of the same book is still that book; token ids would not do, for they depend on what stands before a
word. Runs of 13 words are compared by hash, the length in which contamination of held-out text is usually
told (Brown et al., 2020, appendix C). Letters of scripts that write no spaces count as words. Knows no
tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from services.quantizer.errors import QuantizerError
from services.quantizer.texts import TextFile

NGRAM = 13
MIN_SHARED = 16
"""Distinct n-grams that two files may not have in common: 28 words in a row, or several shorter pieces. A
proverb or the name of an act stays below."""

_WORD = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0eff\u3040-\u9fff]+"
)
_CHUNK_CHARS = 1 << 20
_QUOTED_WORDS = 12
_FACTOR = 0x9E3779B97F4A7C15

Hashes = NDArray[np.uint64]


def refuse_overlap(calibration: Sequence[TextFile], evaluation: Sequence[TextFile]) -> None:
    """Raise QuantizerError naming the first two files that share MIN_SHARED n-grams, or all there are.

    Takes 8 bytes a word of one evaluation file besides the texts.
    """
    for held_out in evaluation:
        known = _distinct([hashes for hashes, _ in _ngrams(held_out)])
        if not len(known):
            continue
        for file in calibration:
            shared, quote = _shared(file, known)
            if shared >= min(MIN_SHARED, len(known)):
                raise QuantizerError(
                    f"{file.path} overlaps the evaluation text {held_out.path}: {shared} of its {len(known)} "
                    f'runs of {NGRAM} words are in both, as in "{quote}"; use another text for one of them'
                )


def _shared(file: TextFile, known: Hashes) -> tuple[int, str]:
    """How many of the sorted hashes `known` the file holds, and the first words that do."""
    found, quote = [], ""
    for hashes, words in _ngrams(file):
        order = np.argsort(hashes)  # sorted questions walk through `known` once, instead of all over it
        asked = hashes[order]
        places = np.minimum(np.searchsorted(known, asked), len(known) - 1)
        is_known = known[places] == asked
        if is_known.any():
            begin = int(order[is_known].min())
            quote = quote or " ".join(words[begin : begin + _QUOTED_WORDS])
            found.append(asked[is_known])
    return len(_distinct(found)), quote


def _distinct(parts: list[Hashes]) -> Hashes:
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)


def _ngrams(file: TextFile) -> Iterator[tuple[Hashes, list[str]]]:
    """(a hash per run of NGRAM words, those words), a chunk at a time; no run crosses a document's end."""
    for document in file.documents:
        carried: list[str] = []
        for chunk in _chunks(document.words()):
            words = carried + _WORD.findall(unicodedata.normalize("NFKC", chunk).casefold())
            if len(words) >= NGRAM:
                yield _hashes(words), words
            carried = words[-(NGRAM - 1) :]


def _chunks(text: str) -> Iterator[str]:
    """Pieces of about a million characters that end at no word's inside."""
    bounds = [0]
    while bounds[-1] < len(text):
        end = bounds[-1] + _CHUNK_CHARS
        following = next(re.compile(r"\W").finditer(text, end), None) if end < len(text) else None
        bounds.append(len(text) if following is None else following.start())
    for begin, end in pairwise(bounds):
        yield text[begin:end]


def _hashes(words: list[str]) -> Hashes:
    # Python's own hash of a string: 64 bits, keyed anew in every process, which is all that is needed.
    each = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    count = len(words) - NGRAM + 1
    total = np.zeros(count, np.uint64)
    for offset in range(NGRAM):
        total = total * np.uint64(_FACTOR) + each[offset : offset + count]
    return total
