"""The list's items about files that no other test holds: tokenizers that lie, and disks that fail."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.gateway.text.tokenization import TokenizationError, Tokenizer
from weft.artifact.checkpoint import Checkpoint, CheckpointError

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
Change = Callable[[dict[str, Any]], Any]


def model(**fields: Any) -> Change:
    return lambda document: document["model"].update(fields)


def added(**fields: Any) -> Change:
    entry = {"id": 4095, "content": "<|x|>", "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}  # fmt: skip
    return lambda document: document["added_tokens"].append({**entry, **fields})


TOKENIZERS: dict[str, Change] = {
    "a merge of an absent token": lambda d: d["model"]["merges"].append(["no such token", "neither"]),
    "merges in a circle": lambda d: d["model"]["merges"].extend([["a", "b"], ["ab", "a"], ["b", "ab"]]),
    "merges of one part": lambda d: d["model"]["merges"].append(["a"]),
    "merges a number": model(merges=5),
    "no vocabulary": model(vocab={}),
    "a vocabulary of lists": model(vocab=[["a", 1]]),
    "an id below zero": lambda d: d["model"]["vocab"].update({"zzz": -1}),
    "an id of 2^64": lambda d: d["model"]["vocab"].update({"zzz": 2**64}),
    "a model of no type": model(type="Oracle"),
    "an added token of nothing": added(content=""),
    "an added token without an id": added(id=None),
    "an added token of id true": added(id=True),
    "added tokens no list": lambda d: d.update(added_tokens={"a": 1}),
    "a normalizer of no type": lambda d: d.update(normalizer={"type": "Oracle"}),
    "a normalizer that is no pattern": lambda d: d.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    ),
    "a sequence of depth 100": lambda d: d.update(normalizer=nested(100)),
}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        found = {"type": "Sequence", "normalizers": [found]}
    return found


@pytest.mark.parametrize("case", TOKENIZERS)
def test_H123_a_tokenizer_that_cannot_be(case: str) -> None:
    """A file that the library cannot use, or we cannot: one clear error, at the load."""
    document = json.loads((DEMO / "tokenizer.json").read_bytes())
    TOKENIZERS[case](document)
    with pytest.raises(TokenizationError, match="tokenizer") as caught:
        Tokenizer(json.dumps(document).encode())
    assert len(str(caught.value)) < 1000


async def test_H123_a_pattern_that_takes_for_ever() -> None:
    """`(a+)+$` in the artifact's normalizer: an error of that text, or its ids; no panic, no hang."""
    document = json.loads((DEMO / "tokenizer.json").read_bytes())
    document["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    tokenizer = Tokenizer(json.dumps(document).encode())
    begin = time.process_time()
    with contextlib.suppress(TokenizationError):
        assert await tokenizer.encode_text("a" * 64 + "!")
    tokenizer.close()
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOSPC, errno.EINTR])
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_H129_a_disk_that_fails(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a checkpoint is opened or its weights are read: an error that names what could not be read."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")

    def failing(first: Any, *_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), *([str(first)] if call == "open" else []))

    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(CheckpointError, match="tensor a"):
        checkpoint.load("a")
    with pytest.raises(CheckpointError, match=r"config\.json|safetensors"):
        Checkpoint.open(tmp_path)
