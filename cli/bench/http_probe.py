"""What an HTTP server can do, found out before the run: its model, its fields, the tokens of its words.

Small requests of two tokens each; none of them is part of a measurement.
"""

from __future__ import annotations

import json
import random
from typing import Any, Protocol

from cli.bench.http_parser import HttpBroken
from cli.bench.records import OK, Record
from cli.bench.settings import Settings
from cli.bench.transport import BenchError, Exchange, Facts, now
from cli.bench.vocabulary import Words, fitted

PROBE_WORDS = (32, 160)


class _Asker(Protocol):
    async def request(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]: ...

    def use(self, facts: Facts) -> None: ...

    async def run(self, exchange: Exchange) -> None: ...


async def probe(asker: _Asker, settings: Settings, *, needs_vocabulary: bool) -> Facts:
    """Ask. Raises BenchError."""
    model, max_model_len = await _model(asker, settings)
    few, many = PROBE_WORDS
    facts = Facts(model, Words(), max_model_len, has_chunk_usage=True)
    record = await _ask(asker, facts, few)
    # A server that does not know the option says so, or says nothing but its usual error.
    if record.outcome != OK and record.status.startswith("HTTP 4"):
        facts = Facts(model, Words(), max_model_len, has_chunk_usage=False)
        record = await _ask(asker, facts, few)
    if record.outcome != OK:
        hint = ""
        if "ignore_eos" in record.reason:
            hint = " (--no-ignore-eos leaves it out; answers may then be shorter than asked)"
        raise BenchError(f"{record.status}: {record.reason}{hint}")
    has_chunk_usage = facts.has_chunk_usage and bool(record.counts) and record.has_counts
    words = Words()
    if needs_vocabulary and record.prompt_tokens is not None:
        second = await _ask(asker, facts, many)
        if second.outcome == OK and second.prompt_tokens is not None:
            words = fitted((few, record.prompt_tokens), (many, second.prompt_tokens))
    more: dict[str, object] = {
        "tokens_per_word": round(words.tokens_per_word, 4),
        "added_tokens": round(words.added_tokens, 2),
        "has_usage": record.completion_tokens is not None,
        "has_chunk_usage": has_chunk_usage,
    }
    return Facts(model, words, max_model_len, has_chunk_usage=has_chunk_usage, more=more)


async def _ask(asker: _Asker, facts: Facts, num_words: int) -> Record:
    asker.use(facts)
    record = Record(index=-1, turn=0, group="", scheduled=now(), asked_tokens=2)
    prompt = Words().draw(random.Random(f"probe {num_words}"), num_words)
    await asker.run(Exchange(prompt, max_tokens=2, record=record, seed=1))
    return record


async def _model(asker: _Asker, settings: Settings) -> tuple[str, int | None]:
    """The model's name, and its context where the server tells."""
    asked = settings.server.model
    try:
        status, body = await asker.request("GET", "/models", None)
        listed = json.loads(body).get("data") if status == 200 else None
    except (OSError, TimeoutError, HttpBroken) as error:
        raise BenchError(f"UNAVAILABLE: {error or type(error).__name__}") from None
    except (ValueError, AttributeError):
        listed = None
    if status in (401, 403):
        raise BenchError(f"HTTP {status}: the key is not good for this server; give --api-key")
    models = {str(m["id"]): m for m in listed or () if isinstance(m, dict) and "id" in m}
    if not asked:
        # What another name goes on from, as "name@version" from "name", is the same model more exactly.
        names = [name for name in sorted(models) if name.partition("@")[0] not in models or "@" not in name]
        if len(names) != 1:
            told = f": {', '.join(names[:20])}" if names else ""
            raise BenchError(f"the server names {len(names)} models; name one with --model{told}")
        (asked,) = names
    found = models.get(asked, {})
    length = found.get("max_model_len", found.get("context_length"))
    return asked, length if type(length) is int and length > 0 else settings.max_model_len
