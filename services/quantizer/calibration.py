"""Text files -> windows of token ids, for calibration and for evaluation.

Paragraphs are joined on one line each, a blank line between them: a hard-wrapped book would otherwise teach
the search the statistics of line breaks. This module does not know the model; only its tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from services.quantizer.errors import QuantizerError
from weft.artifact.manifest import MAX_TOKENIZER_SIZE
from weft.artifact.regular_file import read_regular


def load_tokenizer(directory: Path) -> Tokenizer:
    """tokenizer.json of a checkpoint."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise QuantizerError(f"{path}: missing; a SentencePiece model must be converted first")
    with _library_errors(str(path)):
        tokenizer = Tokenizer.from_buffer(read_regular(path, MAX_TOKENIZER_SIZE))
    # Some files carry what their last user had set; it would cut the text to one window.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def paragraphs_on_one_line(text: str) -> str:
    """Each paragraph (text between blank lines) on a line of its own, blank lines between them."""
    joined = (" ".join(paragraph.split()) for paragraph in text.replace("\r\n", "\n").split("\n\n"))
    return "\n\n".join(paragraph for paragraph in joined if paragraph)


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """The tokenizers library raises plain Exception for anything it dislikes; a panic in it arrives as a
    BaseException of a kind that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise QuantizerError(f"{what}: {str(error)[:200]}") from error
        raise


def windows(tokenizer: Tokenizer, text: str, length: int) -> list[list[int]]:
    """Consecutive windows of exactly `length` tokens, each begun as the tokenizer begins a text (bos, if it
    has one).
    """
    with _library_errors("tokenizer.json: the tokenizer failed"):
        prefix = tokenizer.encode("").ids
        ids = tokenizer.encode(paragraphs_on_one_line(text), add_special_tokens=False).ids
    step = length - len(prefix)
    if step < 1:
        raise QuantizerError(f"a window of {length} tokens has no room beside {len(prefix)} leading ones")
    return [prefix + ids[begin : begin + step] for begin in range(0, len(ids) - step + 1, step)]


def calibration_windows(
    tokenizer: Tokenizer, texts: Sequence[str], samples: int, length: int, seed: int, vocab_size: int
) -> Tensor:
    """int64 [at most samples, length]: windows of all texts, chosen by `seed`, in the order of the texts."""
    found = [window for part in _windows_of_each(tokenizer, texts, length, "calibration") for window in part]
    if len(found) > samples:
        found = [found[index] for index in sorted(random.Random(seed).sample(range(len(found)), samples))]
    return _as_tensor(found, vocab_size)


def evaluation_windows(
    tokenizer: Tokenizer, texts: Sequence[str], num_tokens: int, length: int, vocab_size: int
) -> Tensor:
    """int64 [windows, at most length]: the beginnings of all texts in equal shares, `num_tokens` in all at
    most.
    """
    share = num_tokens // len(texts)
    length = min(length, share)
    if length < 2:  # a window of one token predicts nothing
        raise QuantizerError(f"--evaluation-tokens {num_tokens}: too few for {len(texts)} texts")
    parts = _windows_of_each(tokenizer, texts, length, "evaluation")
    return _as_tensor([window for part in parts for window in part[: share // length]], vocab_size)


def _windows_of_each(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, kind: str
) -> list[list[list[int]]]:
    """Every text's windows. A text that gives none would be accepted and ignored: it is refused."""
    parts = [windows(tokenizer, text, length) for text in texts]
    for number, part in enumerate(parts, 1):
        if not part:
            raise QuantizerError(f"{kind} text {number} holds fewer tokens than one window, {length}")
    return parts


def _as_tensor(found: list[list[int]], vocab_size: int) -> Tensor:
    ids = torch.tensor(found, dtype=torch.int64)
    if int(ids.max()) >= vocab_size:
        raise QuantizerError(f"the tokenizer gives id {int(ids.max())}, the model knows {vocab_size} tokens")
    return ids
