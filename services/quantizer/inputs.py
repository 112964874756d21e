"""What a run reads besides the weights: windows of token ids for calibration and evaluation, and where they
came from. Knows neither how a block is quantized nor what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from services.quantizer.calibration import (
    Text,
    as_token_ids,
    evaluation_windows,
    load_tokenizer,
    num_tokens,
    windows,
)
from services.quantizer.chat import render_conversations
from services.quantizer.config import QuantizerConfig, split_weight
from services.quantizer.errors import QuantizerError
from services.quantizer.overlap import NGRAM, refuse_overlap
from services.quantizer.selection import Unique, select
from services.quantizer.source import Source
from services.quantizer.texts import BUNDLED_CALIBRATION, BUNDLED_EVALUATION, TEXT, TextFile, read_files
from weft import logs

_LOGGER = logs.get_logger("quantizer")
_MAX_EVALUATION_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Inputs:
    """Token ids int64 [windows, length].

    Attributes:
        calibration: what the search sees.
        evaluation: held-out text, or None when nothing is evaluated.
        description: JSON-able, for the report: which files gave how much.
    """

    calibration: Tensor
    evaluation: Tensor | None
    description: dict[str, Any] = field(default_factory=dict)


def _check_vocabulary(tokenizer: Tokenizer, num_rows: int, directory: Path) -> None:
    """Rows of the embedding that no token uses are padding; a token without a row is another model's."""
    num_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if num_ids > num_rows:
        raise QuantizerError(
            f"{directory / 'tokenizer.json'}: {num_ids} token ids, but the embedding has {num_rows} rows"
        )


def read_inputs(config: QuantizerConfig, source: Source) -> Inputs:
    """All text of a run as token ids. Raises QuantizerError."""
    if config.sequence_length > source.max_length:
        raise QuantizerError(
            f"--sequence-length {config.sequence_length}: the model's context is {source.max_length}"
        )
    tokenizer = load_tokenizer(config.source)
    _check_vocabulary(tokenizer, source.vocab_size, config.source)
    given = [split_weight(path) for path in config.calibration]
    files = read_files([path for path, _ in given] or BUNDLED_CALIBRATION, [w for _, w in given] or None)
    calibration, told = _calibration(config, tokenizer, files, source.vocab_size)
    description: dict[str, Any] = {"calibration": told, "evaluation": []}
    if not config.evaluation_tokens:
        return Inputs(calibration, None, description)
    held_out = read_files(config.evaluation or BUNDLED_EVALUATION)
    refuse_overlap(files, held_out)
    description["overlap"] = f"runs of {NGRAM} words compared"
    texts = [_text(config.source, file) for file in held_out]
    evaluation = evaluation_windows(
        tokenizer,
        texts,
        config.evaluation_tokens,
        min(_MAX_EVALUATION_LENGTH, source.max_length),
        source.vocab_size,
        [file.path for file in held_out],
    )
    description["evaluation"] = [
        {"file": file.path.name, "kind": file.kind, "documents": len(file.documents)} for file in held_out
    ]
    return Inputs(calibration, evaluation, description)


def _calibration(
    config: QuantizerConfig, tokenizer: Tokenizer, files: Sequence[TextFile], vocab_size: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The windows chosen, and what each file gave."""
    seen_texts, seen_windows = Unique(), Unique()
    parts, told = [], []
    for file in files:
        text, num_repeated = _unique_text(config.source, file, seen_texts)
        if not text:
            raise QuantizerError(f"{file.path}: all of it is in the calibration files before it")
        found, num_same = seen_windows.windows(windows(tokenizer, text, config.sequence_length))
        if not len(found) and num_same:
            raise QuantizerError(f"{file.path}: all of it is in the calibration files before it")
        if not len(found):
            _refuse_short(file.path, num_tokens(tokenizer, text), config.sequence_length)
        parts.append(found)
        told.append(
            {
                "file": file.path.name,
                "kind": file.kind,
                "weight": file.weight,
                "documents": len(file.documents),
                "duplicate_paragraphs" if file.kind == TEXT else "duplicate_documents": num_repeated,
                "duplicate_windows": num_same,
                "windows": len(found),
            }
        )
    chosen = select(parts, [file.weight for file in files], config.samples, config.seed)
    for entry, indices in zip(told, chosen, strict=True):
        entry.update(chosen=len(indices), tokens=len(indices) * config.sequence_length)
    ids = as_token_ids(
        np.concatenate([part[indices] for part, indices in zip(parts, chosen, strict=True)]), vocab_size
    )
    dropped = sum(
        v for entry in told for key, v in entry.items() if isinstance(v, int) and key.startswith("duplicate")
    )
    if dropped:
        _LOGGER.info("duplicates dropped", **{k: sum(e.get(k, 0) for e in told) for k in _DUPLICATES})
    if len(ids) < config.samples:
        _LOGGER.warning("short calibration text", windows=len(ids), asked=config.samples)
    return ids, told


_DUPLICATES = ("duplicate_paragraphs", "duplicate_documents", "duplicate_windows")


def _unique_text(source: Path, file: TextFile, seen: Unique) -> tuple[Text, int]:
    text = _text(source, file)
    return seen.paragraphs(text) if isinstance(text, str) else seen.documents(text)


def _text(source: Path, file: TextFile) -> Text:
    """Plain text as it is; documents in the order of their lines, conversations through the template."""
    if file.kind == TEXT:
        return file.documents[0].text or ""
    rendered = iter(render_conversations(source, file))
    return [next(rendered) if document.text is None else document.text for document in file.documents]


def _refuse_short(path: Path, found: int, length: int) -> None:
    raise QuantizerError(
        f"calibration {path} holds fewer tokens than one window, {length}; give more text, or "
        f"--sequence-length {found}, which is all of it"
    )
