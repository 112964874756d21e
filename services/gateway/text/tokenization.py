"""Text to token ids, with the model's own tokenizer.json.

What a client wrote can never become a special token: only the chat template's own text may. Knows nothing of
requests, engines or templates' language.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as _RustTokenizer

from services.gateway.text import strict_json

# Above this many bytes an encode would hold the event loop for more than about 5 ms.
INLINE_BYTES = 16 << 10
# Private-use code points; two of them mark the special tokens that a client spelled out.
_MARKERS = range(0xF0000, 0xFFFFE)


class TokenizationError(Exception):
    """The tokenizer cannot do it: its file is bad, or it failed on this text."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One entry of tokenizer.json's added_tokens."""

    id: int
    content: str
    is_special: bool
    strips_left: bool
    strips_right: bool


class Tokenizer:
    """The tokenizer of one artifact. Thread-safe; `document` is its parsed tokenizer.json."""

    def __init__(self, data: bytes) -> None:
        try:
            self.document: dict[str, Any] = strict_json.parse(data, max_depth=64, max_members=5_000_000)
            self._plain = _RustTokenizer.from_str(data.decode("utf-8"))
            self._templated = _RustTokenizer.from_str(data.decode("utf-8"))
        except BaseException as error:
            raise _as_tokenization_error(error, "tokenizer.json cannot be read") from error
        for tokenizer in (self._plain, self._templated):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        self.added_tokens = tuple(_added_tokens(self.document))
        self.special_ids = frozenset(token.id for token in self.added_tokens if token.is_special)
        self._special = {token.content: token for token in self.added_tokens if token.is_special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._right_strip_ids = {t.id for t in self._special.values() if t.strips_right}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    def close(self) -> None:
        """Let the threads go. Encodes under way finish."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def vocabulary(self) -> dict[str, int]:
        """Every token's text as the model file spells it, added tokens included, and its id."""
        return dict(self._plain.get_vocab(with_added_tokens=True))

    async def encode_text(self, text: str) -> list[int]:
        """A client's text: the model's begin token is added, special tokens inside are spelled out."""
        return await self._run(len(text), _encode, self._plain, text, True)

    async def encode_more(self, text: str) -> list[int]:
        """A client's text that goes on from tokens before it: as `encode_text`, without a begin token."""
        return await self._run(len(text), _encode, self._plain, text, False)

    async def encode_chat(self, rendered: str, marker: str | None) -> list[int]:
        """A rendered conversation. Special tokens are honoured, except those that `escape` marked with
        `marker`.
        """
        if marker is None:
            return await self._run(len(rendered), _encode, self._templated, rendered, False)
        return await self._run(len(rendered), self._encode_marked, rendered, marker)

    def escape(self, texts: Iterable[str]) -> tuple[list[str], str | None]:
        """Mark every special token that is spelled out in `texts`. Returns the texts and the marker, which
        is None when there was nothing to mark. The marker stands after the first character of each.
        """
        originals = list(texts)
        spelled = [content for content in self._special if any(content in text for text in originals)]
        if not spelled:
            return originals, None
        while any((marker := _new_marker()) in text for text in originals):
            pass
        return [_mark(text, spelled, marker) for text in originals], marker

    async def _run(self, size: int, function: Any, *arguments: Any) -> list[int]:
        if size <= INLINE_BYTES:
            ids: list[int] = function(*arguments)
            return ids
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _encode_marked(self, rendered: str, marker: str) -> list[int]:
        """Cut at the template's own special tokens; what lies between is a client's text or the template's
        prose.
        """
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(rendered):
            if rendered.startswith(marker, match.end()):
                continue  # of one character: the marker could not go between
            self._extend(
                ids, rendered[start : match.start()].replace(marker, ""), self._special[match.group()]
            )
            start = match.end()
        self._extend(ids, rendered[start:].replace(marker, ""), None)
        return ids

    def _extend(self, ids: list[int], text: str, special: AddedToken | None) -> None:
        if special is not None and special.strips_left:
            text = text.rstrip()
        if ids and ids[-1] in self._right_strip_ids:
            text = text.lstrip()
        if text:
            ids.extend(_encode(self._plain, text, False))
        if special is not None:
            ids.append(special.id)


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    try:
        # encode_batch, unlike encode, lets go of the interpreter lock.
        encoding = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return list(encoding.ids)
    except BaseException as error:
        raise _as_tokenization_error(error, "the tokenizer failed on this text") from error


def _as_tokenization_error(error: BaseException, what: str) -> TokenizationError:
    """A Rust panic arrives as a BaseException of its own kind; what else is no Exception goes on."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return TokenizationError(f"{what}: {str(error)[:200]}")
    raise error


def _new_marker() -> str:
    """Drawn at random: no message holds more than a sliver of all pairs, and nobody knows the next."""
    return chr(secrets.choice(_MARKERS)) + chr(secrets.choice(_MARKERS))


def _mark(text: str, contents: list[str], marker: str) -> str:
    for content in contents:
        text = text.replace(content, content[0] + marker + content[1:])
    return text


def _added_tokens(document: dict[str, Any]) -> Iterable[AddedToken]:
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise TokenizationError("tokenizer.json: added_tokens is no list")
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not entry.get("content"):
            raise TokenizationError("tokenizer.json: an added token lacks id or content")
        yield AddedToken(
            id=entry["id"],
            content=str(entry["content"]),
            is_special=bool(entry.get("special")),
            strips_left=bool(entry.get("lstrip")),
            strips_right=bool(entry.get("rstrip")),
        )
