"""Incremental text equals that of the whole list, for byte-level BPE and byte fallback; cost is linear."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from services.gateway.text.detokenizer import Detokenizer, Vocabulary
from services.gateway.text.tokenization import TokenizationError, Tokenizer

DEMO = Path(__file__).resolve().parents[4] / "models" / "demo" / "tokenizer.json"


def fallback_document() -> dict[str, Any]:
    """A tokenizer of the SentencePiece kind: bytes 0-255, then a few words."""
    vocab: dict[str, int] = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for word in ("▁Hello", "▁world", "é", "▁", "x", "�"):
        vocab[word] = len(vocab)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": content,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, content in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }


@cache
def byte_level() -> tuple[Vocabulary, Any]:
    data = DEMO.read_bytes()
    return Vocabulary(Tokenizer(data)), RustTokenizer.from_str(data.decode())


@cache
def byte_fallback() -> tuple[Vocabulary, Any]:
    data = json.dumps(fallback_document()).encode()
    return Vocabulary(Tokenizer(data)), RustTokenizer.from_str(data.decode())


def incremental(vocabulary: Vocabulary, chunks: list[list[int]], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(vocabulary, skip_special_tokens=skip)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4095), max_size=6), max_size=12),
    st.booleans(),
)
def test_any_ids_give_the_text_of_the_library(chunks: list[list[int]], skip: bool) -> None:
    """Random ids: most are broken UTF-8 somewhere."""
    vocabulary, oracle = byte_level()
    flat = [i for chunk in chunks for i in chunk]
    expected = oracle.decode(flat, skip_special_tokens=skip)
    assert "".join(incremental(vocabulary, chunks, skip=skip)) == expected
    assert vocabulary.decode(flat, skip_special_tokens=skip) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_no_character_is_split(text: str) -> None:
    vocabulary, oracle = byte_level()
    ids = oracle.encode(text, add_special_tokens=False).ids
    pieces = incremental(vocabulary, [[i] for i in ids], skip=False)
    assert "".join(pieces) == text
    position = 0
    for piece in pieces:  # U+FFFD only where the text has one
        assert text.startswith(piece, position)
        position += len(piece)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*"héx €😀 ", "Hello", " world"]), max_size=20))
def test_byte_fallback_gives_the_text_of_the_library(words: list[str]) -> None:
    """Valid byte runs only: an invalid run is one U+FFFD a byte in the library, which no stream can know
    early.
    """
    vocabulary, oracle = byte_fallback()
    ids = oracle.encode("".join(words), add_special_tokens=False).ids
    assert 0 not in ids
    assert vocabulary.decode(ids) == oracle.decode(ids)
    whole = "".join(incremental(vocabulary, [[i] for i in ids]))
    assert whole.removeprefix(" ") == oracle.decode(ids) or whole == oracle.decode(ids)


def test_a_continuation_keeps_its_first_space() -> None:
    vocabulary, oracle = byte_fallback()
    ids = [oracle.token_to_id("▁world")]
    assert "".join(incremental(vocabulary, [ids])) == " world"
    assert vocabulary.decode(ids) == "world"


def test_ids_beyond_the_vocabulary_spell_nothing() -> None:
    vocabulary, _ = byte_level()
    assert vocabulary.decode([4096, 10**9]) == ""
    assert vocabulary.piece(10**9) == b""


def test_bytes_that_never_make_a_character_cost_linear_time() -> None:
    vocabulary, oracle = byte_fallback()
    lead = oracle.token_to_id("<0xF0>")
    detokenizer = Detokenizer(vocabulary)
    begin = time.perf_counter()
    text = "".join(detokenizer.push((lead,)) for _ in range(100_000)) + detokenizer.finish()
    assert time.perf_counter() - begin < 2.0
    assert text == "�" * 100_000


def test_an_unknown_decoder_is_refused() -> None:
    document = fallback_document()
    document["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(TokenizationError, match="WordPiece"):
        Vocabulary(Tokenizer(json.dumps(document).encode()))
