"""What the mock engine draws, as a pure function. Knows no engine; a checker needs nothing else.

A token is a keyed hash of the history before it. The key is the request's seed and the sample's index, so
samples of one request differ, and the same request draws the same tokens on every engine. Only ordinary token
ids of the demo model's tokenizer are drawn, never a special one; temperature and penalties change nothing.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

FIRST_TOKEN_ID = 300
NUM_TOKEN_IDS = 3000
"""Tokens are FIRST_TOKEN_ID and the NUM_TOKEN_IDS - 1 ids behind it: ordinary ids of models/demo."""

TYPECODE = "I"
TOKEN_BYTES = 4


def history_bytes(token_ids: Iterable[int]) -> bytes:
    """Token ids as the hash takes them: unsigned 32-bit integers, least significant byte first."""
    ids = array(TYPECODE, token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def sample_key(seed: int, sample_index: int) -> bytes:
    """The key of one sample: two unsigned 64-bit integers."""
    return seed.to_bytes(8, "little") + sample_index.to_bytes(8, "little")


def token_after(history: bytes, key: bytes, vocabulary: int = NUM_TOKEN_IDS) -> int:
    """The token that follows a history, as `history_bytes` gives it, under a `sample_key`."""
    digest = blake2b(history, key=key, digest_size=8).digest()
    return FIRST_TOKEN_ID + int.from_bytes(digest, "little") % vocabulary


def next_token(
    history_ids: Sequence[int], seed: int, sample_index: int = 0, vocabulary: int = NUM_TOKEN_IDS
) -> int:
    """The token that follows these token ids; `vocabulary` is how many different ids are drawn."""
    return token_after(history_bytes(history_ids), sample_key(seed, sample_index), vocabulary)


def expected_tokens(
    prompt_ids: Sequence[int],
    seed: int,
    sample_index: int,
    num_tokens: int,
    *,
    emitted_ids: Sequence[int] = (),
    stop_ids: Iterable[int] = (),
    vocabulary: int = NUM_TOKEN_IDS,
) -> list[int]:
    """What an undisturbed engine draws: `num_tokens` ids, or fewer when one of `stop_ids` comes first (it is
    the last then). `emitted_ids` were drawn before; they count, and are returned in front.
    """
    stops = frozenset(stop_ids)
    key = sample_key(seed, sample_index)
    output = list(emitted_ids)
    history = history_bytes([*prompt_ids, *output])
    while len(output) < num_tokens:
        token_id = token_after(history, key, vocabulary)
        output.append(token_id)
        if token_id in stops:
            break
        history += history_bytes((token_id,))
    return output


def logprob(token_id: int) -> float:
    """The log-probability that is told for a drawn token: made up, exact in 32 bits."""
    return -(token_id * 37 % 1024) / 256


def top_logprobs(token_id: int, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens beside a drawn one, (id, log-probability), likeliest first: made up."""
    first = token_id - FIRST_TOKEN_ID
    return tuple((FIRST_TOKEN_ID + (first + 7 * rank) % NUM_TOKEN_IDS, -rank / 8) for rank in range(count))
