"""Texts -> windows of token ids, for calibration and for evaluation.

Paragraphs of plain text are joined on one line each, a blank line between them: a hard-wrapped book would
otherwise teach the search the statistics of line breaks. Documents of JSON lines stay as they are and are
packed: put one after another, each begun as the tokenizer begins a text, then cut. This module does not know
the model; only its tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from services.quantizer.errors import QuantizerError
from weft.artifact.manifest import MAX_TOKENIZER_SIZE
from weft.artifact.regular_file import read_regular

Ids = NDArray[np.int32]
Text = str | Sequence[str]
"""Plain text, or documents that are not to be changed."""

_CHUNK_CHARS = 4 << 20
_DOCUMENTS_PER_BATCH = 256


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


def windows(tokenizer: Tokenizer, text: Text, length: int) -> Ids:
    """int32 [windows, length]: consecutive windows, each begun as the tokenizer begins a text (bos, if it has
    one). What is left at the end is too short for one.
    """
    with _library_errors("tokenizer.json: the tokenizer failed"):
        prefix = np.array(tokenizer.encode("").ids, np.int32)
        step = length - len(prefix)
        if step < 1:
            raise QuantizerError(f"a window of {length} tokens has no room beside {len(prefix)} leading ones")
        ids, separator = _stream(tokenizer, text, prefix)
    found, begin = [], 0
    while begin + step <= len(ids):
        if len(separator) and np.array_equal(ids[begin : begin + len(separator)], separator):
            begin += len(separator)  # the window's own beginning stands for the document's
            continue
        found.append(np.concatenate([prefix, ids[begin : begin + step]]))
        begin += step
    return np.stack(found) if found else np.zeros((0, length), np.int32)


def num_tokens(tokenizer: Tokenizer, text: Text) -> int:
    """How many tokens a text has with its beginning: the length of the longest window."""
    with _library_errors("tokenizer.json: the tokenizer failed"):
        prefix = np.array(tokenizer.encode("").ids, np.int32)
        return len(prefix) + len(_stream(tokenizer, text, prefix)[0])


def _stream(tokenizer: Tokenizer, text: Text, prefix: Ids) -> tuple[Ids, Ids]:
    """All ids of a text without its beginning, and what stands between documents (nothing in plain text)."""
    nothing = np.zeros(0, np.int32)
    if isinstance(text, str):
        pieces = _pieces(paragraphs_on_one_line(text))
        parts = [np.array(tokenizer.encode(p, add_special_tokens=False).ids, np.int32) for p in pieces]
        return np.concatenate([nothing, *parts]), nothing
    # Without a beginning of its own a document is told from the one before by a blank line.
    between = prefix if len(prefix) else _encode(tokenizer, ["\n\n"])[0]
    parts = []
    for begin in range(0, len(text), _DOCUMENTS_PER_BATCH):
        for ids in _encode(tokenizer, text[begin : begin + _DOCUMENTS_PER_BATCH]):
            if len(prefix) and np.array_equal(ids[: len(prefix)], prefix):
                ids = ids[len(prefix) :]  # a chat template has written it
            parts += [between, ids]
    return np.concatenate([nothing, *parts[1:]]), between


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    return [np.array(e.ids, np.int32) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of some MiB that end with a paragraph: what the library keeps beside each id would not
    fit for a large one.
    """
    begin = 0
    while begin < len(text):
        end = text.find("\n\n", begin + _CHUNK_CHARS)
        end = len(text) if end < 0 else end
        yield text[begin:end]
        begin = end


def calibration_windows(
    tokenizer: Tokenizer, texts: Sequence[Text], samples: int, length: int, seed: int, vocab_size: int
) -> Tensor:
    """int64 [at most samples, length]: windows of all texts, chosen by `seed`, in the order of the texts."""
    parts = _windows_of_each(tokenizer, texts, length, "calibration")
    found = np.concatenate(parts)
    return as_token_ids(found[choose(len(found), samples, seed)], vocab_size)


def choose(count: int, wanted: int, seed: int | str) -> list[int]:
    """At most `wanted` of range(count), ascending, by the seed alone."""
    if count <= wanted:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), wanted))


def evaluation_windows(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    num_tokens: int,
    length: int,
    vocab_size: int,
    names: Sequence[object] = (),
) -> Tensor:
    """int64 [windows, at most length]: the beginnings of all texts in equal shares, `num_tokens` in all at
    most. `names` are for errors.
    """
    share = num_tokens // len(texts)
    length = min(length, share)
    if length < 2:  # a window of one token predicts nothing
        raise QuantizerError(f"--evaluation-tokens {num_tokens}: too few for {len(texts)} texts")
    parts = _windows_of_each(tokenizer, texts, length, "evaluation", names)
    return as_token_ids(np.concatenate([part[: share // length] for part in parts]), vocab_size)


def _windows_of_each(
    tokenizer: Tokenizer, texts: Sequence[Text], length: int, kind: str, names: Sequence[object] = ()
) -> list[Ids]:
    """Every text's windows. A text that gives none would be accepted and ignored: it is refused."""
    parts = [windows(tokenizer, text, length) for text in texts]
    for number, part in enumerate(parts, 1):
        if not len(part):
            name = names[number - 1] if names else f"text {number}"
            raise QuantizerError(f"{kind} {name} holds fewer tokens than one window, {length}")
    return parts


def as_token_ids(found: Ids, vocab_size: int) -> Tensor:
    """int64, if the model knows them all."""
    if int(found.max()) >= vocab_size:
        raise QuantizerError(
            f"the tokenizer gives id {int(found.max())}, the model knows {vocab_size} tokens"
        )
    return torch.from_numpy(found.astype(np.int64))
