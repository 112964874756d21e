"""Requests over HTTP: /v1/completions and /v1/chat/completions of any server that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from cli.bench.http_connection import Connection, Pool, allow_connections, origin_of
from cli.bench.http_parser import AnswerParser, EventParser, HttpBroken
from cli.bench.http_probe import probe
from cli.bench.records import CANCELLED, FAILED, INTERRUPTED, OK, Record
from cli.bench.settings import Settings
from cli.bench.transport import BenchError, Exchange, Facts, now
from cli.bench.vocabulary import Prompt

MAX_ERROR_BYTES = 64 << 10
_PATHS = {"completions": "/completions", "chat": "/chat/completions"}


class HttpTransport:
    """Requests over kept connections."""

    def __init__(self, settings: Settings, concurrency: int) -> None:
        self._settings = settings
        self._pool = Pool(origin_of(settings.server))
        self._facts: Facts | None = None
        self._is_chat = settings.server.endpoint == "chat"

    async def open(self) -> None:
        """One connection, to see that somebody is there."""
        allow_connections()
        origin = self._pool.origin
        try:
            connection, _ = await self._pool.take()
        except (OSError, TimeoutError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BenchError(
                f"UNAVAILABLE: nobody answers at {origin.authority}: {' '.join(str(why).split())}"
            ) from None
        self._pool.give(connection)

    async def facts(self, *, needs_vocabulary: bool) -> Facts:
        """The model, what the server takes and how many tokens its words have."""
        facts = await probe(self, self._settings, needs_vocabulary=needs_vocabulary)
        self.use(facts)
        return facts

    def use(self, facts: Facts) -> None:
        """Requests name the model, and ask for what the server can say."""
        self._facts = facts

    async def run(self, exchange: Exchange) -> None:
        """One request."""
        record = exchange.record
        has_usage = self._facts is not None and self._facts.has_chunk_usage
        model = self._facts.model if self._facts is not None else ""
        body = self.body(exchange, model, has_chunk_usage=has_usage)
        record.sent = now()
        answer = _Answer(record, exchange.pause_s)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                parser = await self._send(self._head_and(body), answer)
            answer.finished(parser, now())
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:  # our own; the system's has a number
                record.ended(now(), FAILED, "TIMEOUT", f"no end within {self._settings.timeout_s:g} s")
            else:
                why = error.strerror or str(error) or type(error).__name__
                record.ended(now(), FAILED, "CONNECTION", why)
        except HttpBroken as error:
            record.ended(now(), FAILED, "BROKEN", str(error))
        except asyncio.CancelledError:
            record.ended(now(), INTERRUPTED)
            raise
        except Exception as error:
            record.ended(now(), FAILED, "CLIENT", f"{type(error).__name__}: {error}")
        if exchange.session_id and record.outcome == OK:
            exchange.history.append((exchange.prompt, "".join(answer.texts)))

    def body(self, exchange: Exchange, model: str, *, has_chunk_usage: bool = False) -> dict[str, Any]:
        """The JSON of one request."""
        workload = self._settings.workload
        options: dict[str, Any] = {"include_usage": True}
        if has_chunk_usage:
            options["continuous_usage_stats"] = True
        body: dict[str, Any] = {
            "model": model,
            "stream": True,
            "stream_options": options,
            "max_tokens": exchange.max_tokens,
            "seed": exchange.seed % 2**31,
        }
        if workload.is_ignoring_eos:
            body["ignore_eos"] = True
        if workload.temperature is not None:
            body["temperature"] = workload.temperature
        if self._is_chat:
            body["messages"] = _messages(exchange.history, exchange.prompt)
        else:
            body["prompt"] = _text(exchange.history, exchange.prompt)
        return body | self._settings.server.extra_body

    async def request(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        """A small request and its whole answer. Raises OSError, TimeoutError and HttpBroken."""
        pieces: list[bytes] = []

        def keep(_: AnswerParser, piece: bytes, __: float) -> bool:
            pieces.append(piece)
            return False

        async with asyncio.timeout(self._settings.timeout_s):
            connection, _ = await self._pool.take()
            try:
                parser = await connection.exchange(self._head_and(body, method, path), keep)
            finally:
                self._pool.give(connection)
        return parser.status, b"".join(pieces)

    async def begin_session(self, session_id: str) -> bool:
        """The API has none: the conversation is sent again every time."""
        return False

    async def end_session(self, session_id: str) -> None:
        """Nothing to end."""

    async def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def _head_and(self, body: dict[str, Any] | None, method: str = "POST", path: str = "") -> bytes:
        origin, server = self._pool.origin, self._settings.server
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {origin.path}{path or _PATHS[server.endpoint]} HTTP/1.1",
            f"host: {origin.authority}",
            "accept: text/event-stream, application/json",
            "accept-encoding: identity",
            "user-agent: weft-bench",
        ]
        if server.api_key:
            lines.append(f"authorization: Bearer {server.api_key}")
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(data)}"]
        return "\r\n".join([*lines, "", ""]).encode() + data

    async def _send(self, data: bytes, answer: _Answer) -> AnswerParser:
        while True:
            connection, was_used = await self._pool.take()
            answer.connection = connection
            try:
                return await connection.exchange(data, answer.take)
            except (OSError, HttpBroken):
                # The server may close an idle connection just when it is used again: nothing was answered,
                # and the request is sent once more, on the clock.
                if not was_used or answer.has_begun:
                    raise
            finally:
                self._pool.give(connection)


class _Answer:
    """What has come of one answer."""

    def __init__(self, record: Record, pause_s: float) -> None:
        self.connection: Connection | None = None
        self.texts: list[str] = []
        self.has_begun = False
        self._record = record
        self._pause_s = pause_s
        self._events = EventParser()
        self._body = b""
        self._num_tokens = 0
        self._error: tuple[str, str] | None = None

    def take(self, parser: AnswerParser, piece: bytes, at: float) -> bool:
        self.has_begun = True
        if parser.status != 200 or "event-stream" not in parser.headers.get("content-type", ""):
            self._body = (self._body + piece)[:MAX_ERROR_BYTES]
            return False
        has_tokens = False
        for data in self._events.feed(piece):
            if data == b"[DONE]" or not data:
                continue
            had = len(self._record.times)
            try:
                chunk = json.loads(data)
            except ValueError:
                raise HttpBroken("an event is not JSON") from None
            if self._chunk(chunk, at):
                self._record.ended(now(), CANCELLED)
                return True
            has_tokens |= len(self._record.times) > had
        if self._pause_s and has_tokens and self.connection is not None:
            self.connection.pause()
            asyncio.get_running_loop().call_later(self._pause_s, self.connection.resume)
        return False

    def finished(self, parser: AnswerParser, at: float) -> None:
        record = self._record
        if record.outcome:
            return
        if parser.status != 200 or self._body:
            record.ended(at, FAILED, f"HTTP {parser.status}", error_text(self._body))
        elif self._error is not None:
            record.ended(at, FAILED, *self._error)
        elif record.finish:
            if record.counts and record.has_counts and (record.completion_tokens or 0) > self._num_tokens:
                # What came behind the last text, as an end token, came with no message of its own.
                record.counts[-1] += (record.completion_tokens or 0) - self._num_tokens
            record.ended(at, OK)
        else:
            record.ended(at, FAILED, "INCOMPLETE", "the stream ended without a finish_reason")

    def _chunk(self, chunk: Any, at: float) -> bool:
        if not isinstance(chunk, dict):
            raise HttpBroken("an event is no object")
        if chunk.get("error"):
            self._error = ("STREAM", error_text(json.dumps(chunk).encode()))
            return False
        record = self._record
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            record.prompt_tokens = usage.get("prompt_tokens")
            record.completion_tokens = usage.get("completion_tokens")
            details = usage.get("prompt_tokens_details")
            record.cached_tokens = details.get("cached_tokens") if isinstance(details, dict) else None
        is_cancelled = False
        for choice in chunk.get("choices") or ():
            text = _text_of(choice)
            if text:
                self.texts.append(text)
                total = record.completion_tokens or 0
                num_new, self._num_tokens = max(0, total - self._num_tokens), total
                is_cancelled = record.arrived(at, num_new)
            if choice.get("finish_reason"):
                record.finish = str(choice["finish_reason"])
        return is_cancelled


def _text_of(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    return choice.get("text") or ""


def error_text(body: bytes) -> str:
    """What an error's body says, in one line: OpenAI's form, FastAPI's, or its beginning."""
    try:
        document = json.loads(body)
    except ValueError:
        return body[:200].decode("utf-8", "replace")
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, dict):
        code = error.get("code") or error.get("type")
        message = error.get("message") or error.get("detail") or ""
        return f"{code}: {message}" if code and isinstance(code, str) else str(message)
    return str(error)


def _messages(history: list[tuple[Prompt, str]], prompt: Prompt) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for question, answer in history:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*found, {"role": "user", "content": prompt}]


def _text(history: list[tuple[Prompt, str]], prompt: Prompt) -> Prompt:
    if not history:
        return prompt
    return "".join(f"{question}{answer} " for question, answer in history) + str(prompt)
