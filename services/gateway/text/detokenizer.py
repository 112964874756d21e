"""Token ids to text, a few tokens at a time, never splitting a character, at a cost linear in the text.

Instead of decoding a growing list again and again, every token's bytes are read off tokenizer.json once;
text is then what an incremental UTF-8 decoder makes of the bytes. Bytes that are no UTF-8 become U+FFFD as
in any decoder. Knows nothing of stop strings or requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Any

from services.gateway.text.tokenization import TokenizationError, Tokenizer

_REPLACING_DECODER = codecs.getincrementaldecoder("utf-8")


class Vocabulary:
    """What each token id spells, in bytes. `size` is one past the largest id of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        spell = _speller(tokenizer.document.get("decoder"))
        vocabulary = tokenizer.vocabulary()
        self.size = max(vocabulary.values(), default=-1) + 1
        if self.size > 4 * len(vocabulary) + 1024:
            raise TokenizationError("tokenizer.json: token ids leave large gaps")
        # An id that no token has spells nothing, as in any decoder: embeddings are often padded beyond the
        # tokens.
        self.pieces = [b""] * self.size
        for token, token_id in vocabulary.items():
            self.pieces[token_id] = spell(token)
        self.special_ids = tokenizer.special_ids
        self.visible_pieces = list(self.pieces)
        for token_id in self.special_ids:
            self.visible_pieces[token_id] = b""
        self.strips_first_space = _strips_first_space(tokenizer.document.get("decoder"))

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token, special ones included."""
        return self.pieces[token_id] if token_id < self.size else b""

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole list, as the start of a text: a first space that only marks the word goes."""
        detokenizer = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        text = detokenizer.push(token_ids) + detokenizer.finish()
        return text[1:] if self.strips_first_space and text.startswith(" ") else text


class Detokenizer:
    """The text of one output as it grows. Output goes on from a prompt, so no first space is taken away."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool = True) -> None:
        self._pieces = vocabulary.visible_pieces if skip_special_tokens else vocabulary.pieces
        # Only between the bytes of one character: text is mostly whole, and needs no state then.
        self._decoder: codecs.IncrementalDecoder | None = None

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that `token_ids` complete."""
        pieces = self._pieces
        size = len(pieces)
        data = b"".join([pieces[i] for i in token_ids if i < size])
        decoder = self._decoder
        if decoder is None:
            try:
                return data.decode()
            except UnicodeDecodeError:
                decoder = self._decoder = _REPLACING_DECODER("replace")
        text = decoder.decode(data)
        if not decoder.getstate()[0]:
            self._decoder = None
        return text

    def finish(self) -> str:
        """What is left of a character that was never completed, as U+FFFD; mostly nothing."""
        decoder, self._decoder = self._decoder, None
        return "" if decoder is None else decoder.decode(b"", True)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the rest from
    U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTES = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:  # an added token that is not spelled in the alphabet stands for itself
        return token.encode("utf-8", "replace")


def _fallback_byte(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        raise TokenizationError("tokenizer.json: it has no decoder")
    if decoder.get("type") != "Sequence":
        return [decoder]
    steps = decoder.get("decoders")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise TokenizationError("tokenizer.json: the decoder's sequence is no list")
    return steps


def _speller(decoder: Any) -> Callable[[str], bytes]:
    """The function from a token to its bytes. Raises TokenizationError for a decoder that is not token by
    token.
    """
    replacements: list[tuple[str, str]] = []
    has_fallback = False
    for step in _steps(decoder):
        kind = step.get("type")
        pattern = step.get("pattern")
        if kind == "ByteLevel":
            return _byte_level
        elif kind == "Metaspace":
            replacements.append((str(step.get("replacement", "▁")), " "))
        elif kind == "Replace" and isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
            replacements.append((pattern["String"], str(step.get("content", ""))))
        elif kind == "ByteFallback":
            has_fallback = True
        elif kind != "Fuse" and not _is_first_space_strip(step):
            raise TokenizationError(f"tokenizer.json: decoder {str(kind)[:40]} is not supported")

    def spell(token: str) -> bytes:
        byte = _fallback_byte(token) if has_fallback else None
        if byte is not None:
            return byte
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode("utf-8", "replace")

    return spell


def _is_first_space_strip(step: dict[str, Any]) -> bool:
    return step.get("type") == "Strip" and step.get("content") == " " and step.get("stop") == 0


def _strips_first_space(decoder: Any) -> bool:
    return any(
        (_is_first_space_strip(step) and step.get("start") == 1)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in _steps(decoder)
    )
