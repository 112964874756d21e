"""The text files of a run. Knows no tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from services.quantizer.errors import QuantizerError
from weft.artifact.regular_file import FileRefusedError, read_regular

MAX_TEXT_SIZE = 64 << 20
_DATA = Path(__file__).parent / "data"
BUNDLED_CALIBRATION = (_DATA / "calibration.txt",)
BUNDLED_EVALUATION = (_DATA / "evaluation_dubliners.txt", _DATA / "evaluation_alice.txt")


def read_texts(paths: Sequence[Path]) -> tuple[list[str], str]:
    """The texts, and a digest of their bytes. Refuses what is missing, empty, huge or not UTF-8."""
    texts, hasher = [], hashlib.sha256()
    for path in paths:
        try:
            data = read_regular(path, MAX_TEXT_SIZE)
        except FileNotFoundError:
            raise QuantizerError(f"{path}: no such file") from None
        except (OSError, FileRefusedError) as error:
            raise QuantizerError(str(error)) from error
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise QuantizerError(f"{path}: not UTF-8 at byte {error.start}") from None
        if not text.strip():
            raise QuantizerError(f"{path}: empty")
        hasher.update(len(data).to_bytes(8, "little") + data)
        texts.append(text)
    return texts, "sha256:" + hasher.hexdigest()
