"""The text files of a run: plain text, or JSON lines of texts and conversations. Knows no tokenizer.

Standard library only: what is up to date is found so without importing torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.quantizer.errors import QuantizerError
from weft.artifact.regular_file import FileRefusedError, read_regular
from weft.strict_json import StrictJsonError, loads

MAX_TEXT_SIZE = 64 << 20
MAX_LINE_SIZE = 8 << 20
MAX_DOCUMENTS = 1 << 20
MAX_MESSAGES = 4096
TEXT, JSON_LINES = "text", "jsonl"
_SUFFIXES = (".jsonl", ".ndjson")
_KEYS = ("text", "messages")
_DATA = Path(__file__).parent / "data"
BUNDLED_CALIBRATION = (_DATA / "calibration.txt",)
BUNDLED_EVALUATION = (_DATA / "evaluation_dubliners.txt", _DATA / "evaluation_alice.txt")

Message = dict[str, Any]
"""One message of a conversation, as a chat template takes it: at least `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a conversation that a chat template will make one.

    Attributes:
        line: where it begins in its file, from 1.
        text: None for a conversation.
        conversation: what the template is given: `messages`, and `tools` if there are any.
    """

    line: int
    text: str | None
    conversation: dict[str, Any] | None = None

    def words(self) -> str:
        """What people wrote in it, without a template's marks."""
        if self.conversation is None:
            return self.text or ""
        return "\n\n".join(_spoken(message) for message in self.conversation["messages"])


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file's documents: one for plain text, one a line for JSON lines. `weight` is None when none was
    given.
    """

    path: Path
    kind: str
    documents: tuple[Document, ...]
    weight: float | None = None


def read_texts(paths: Sequence[Path]) -> tuple[list[str], str]:
    """Files whole as they are, and a digest of their bytes and kinds. Refuses what is missing, empty, huge or
    not UTF-8.
    """
    texts, hasher = [], hashlib.sha256()
    for path in paths:
        text = _read(path)
        data = text.encode("utf-8")
        hasher.update(_kind(path, text).encode() + len(data).to_bytes(8, "little") + data)
        texts.append(text)
    return texts, "sha256:" + hasher.hexdigest()


def read_files(paths: Sequence[Path], weights: Sequence[float | None] | None = None) -> list[TextFile]:
    """The same files, parsed. Every bad line is refused as file:line."""
    files = []
    for path, weight in zip(paths, weights or [None] * len(paths), strict=True):
        text = _read(path)
        kind = _kind(path, text)
        documents = tuple(_lines(path, text)) if kind == JSON_LINES else (Document(1, text),)
        if len(documents) > MAX_DOCUMENTS:
            raise QuantizerError(f"{path}: more than {MAX_DOCUMENTS} documents")
        files.append(TextFile(path, kind, documents, weight))
    return files


def _read(path: Path) -> str:
    try:
        data = read_regular(path, MAX_TEXT_SIZE)
    except FileNotFoundError:
        raise QuantizerError(f"{path}: no such file") from None
    except (OSError, ValueError, FileRefusedError) as error:  # ValueError: a name with a zero byte
        raise QuantizerError(str(error)) from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise QuantizerError(f"{path}:{line}: not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise QuantizerError(f"{path}: empty")
    return text


def _kind(path: Path, text: str) -> str:
    """By the name, else by the first line: JSON lines are one object with a key of ours."""
    if path.suffix.lower() in _SUFFIXES:
        return JSON_LINES
    first = text.lstrip().split("\n", 1)[0]
    if not first.startswith("{") or len(first) > MAX_LINE_SIZE:
        return TEXT
    try:
        document = json.loads(first)
    except (ValueError, RecursionError):
        return TEXT
    return JSON_LINES if any(key in document for key in _KEYS) else TEXT


def _lines(path: Path, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also break at U+2028
        if not line.strip():
            continue
        try:
            yield _document(number, line)
        except ValueError as error:
            raise QuantizerError(f"{path}:{number}: {error}") from None


def _document(number: int, line: str) -> Document:
    """Raises ValueError with the reason."""
    if len(line) > MAX_LINE_SIZE:
        raise ValueError(f"{len(line)} characters; a line may have {MAX_LINE_SIZE}")
    try:
        value = loads(line)
    except StrictJsonError as error:
        raise ValueError(f"no JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, found {type(value).__name__}")
    found = [key for key in _KEYS if key in value]
    if len(found) != 1:
        raise ValueError(f"one of text and messages is expected, found {' and '.join(found) or 'neither'}")
    try:
        line.encode("utf-8"), json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None
    if found == ["text"]:
        if not isinstance(value["text"], str) or not value["text"].strip():
            raise ValueError("text is not a text of at least one character")
        return Document(number, value["text"])
    conversation = {"messages": _messages(value["messages"])}
    if value.get("tools") is not None:
        if not isinstance(value["tools"], list):
            raise ValueError("tools is not a list")
        conversation["tools"] = value["tools"]
    return Document(number, None, conversation)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise ValueError(f"messages is not a list of 1 to {MAX_MESSAGES} messages")
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is not an object")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not 0 < len(role) <= 64:
            raise ValueError(f"{where}: role is missing or no short text")
        if content is None and not message.get("tool_calls"):
            raise ValueError(f"{where}: content is missing")
        if not _is_content(content):
            raise ValueError(f"{where}: content is neither a text nor a list of text parts")
    return value


def _is_content(content: Any) -> bool:
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def _spoken(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
