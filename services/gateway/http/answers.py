"""Updates of a request as the JSON that OpenAI-compatible clients read: whole answers, and chunks. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from services.gateway.http.parameters import HttpRequest
from services.gateway.request import ResolvedRequest, SampleEnd, SampleUpdate
from weft.v1 import generation_pb2 as pb

# Clients know stop and length only; `stop_reason` says it exactly.
_REASONS = {
    pb.FINISH_REASON_STOP: ("stop", None),
    pb.FINISH_REASON_LENGTH: ("length", None),
    pb.FINISH_REASON_CANCELLED: ("stop", "cancelled"),
    pb.FINISH_REASON_DEADLINE: ("length", "deadline"),
}


class AnswerWriter:
    """Writes the answer to the requests of one body. Feed it every update, with the index of its request; it
    keeps what the end needs. Choice p * n + i is sample i of prompt p.
    """

    def __init__(self, request: HttpRequest, request_id: str, resolved: Sequence[ResolvedRequest]) -> None:
        self._request = request
        self._request_id = request_id
        self._resolved = resolved
        self._created = int(time.time())
        self._num_samples = resolved[0].num_samples
        self._vocabulary = resolved[0].assets.vocabulary
        num_choices = len(resolved) * self._num_samples
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[Any]] = [[] for _ in range(num_choices)]
        self._offsets = [0] * num_choices
        self._counts = [0] * num_choices
        self._ends: dict[int, SampleEnd] = {}

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a chat stream begins with: the role, once a choice."""
        if not self._request.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([self._choice(index, {"delta": delta}, None, None)], self._usage_so_far(index))
            for index in range(len(self._texts))
        ]

    def chunks(self, prompt: int, updates: list[SampleUpdate]) -> list[dict[str, Any]]:
        """The chunks of some updates; one without text is sent only for what else it carries."""
        found = []
        for update in updates:
            index = prompt * self._num_samples + update.sample_index
            logprobs = self._logprobs_of(index, update)
            self._counts[index] += len(update.token_ids)
            if update.end is not None:
                self._ends[index] = update.end
            if not (update.text or update.end is not None or logprobs):
                continue
            if self._request.is_chat:
                content: dict[str, Any] = {"delta": {"content": update.text} if update.text else {}}
            else:
                content = {"text": update.text}
            choice = self._choice(index, content, self._wrap(logprobs), update.end)
            found.append(self._chunk([choice], self._usage_so_far(index)))
        return found

    def usage_chunk(self) -> dict[str, Any] | None:
        """The chunk after all others, when the client asked for it."""
        if not self._request.includes_usage:
            return None
        return {**self._chunk([]), "usage": self._usage()}

    def add(self, prompt: int, updates: list[SampleUpdate]) -> None:
        """Take in updates of an answer that is sent whole."""
        for update in updates:
            index = prompt * self._num_samples + update.sample_index
            self._texts[index].append(update.text)
            self._logprobs[index] += self._logprobs_of(index, update)
            if update.end is not None:
                self._ends[index] = update.end

    def whole(self) -> dict[str, Any]:
        """The whole answer, once every sample has ended."""
        choices = []
        for index, pieces in enumerate(self._texts):
            text = "".join(pieces)
            if self._request.is_chat:
                message = {"role": "assistant", "content": text, "refusal": None}
                content: dict[str, Any] = {"message": message}
            else:
                content = {"text": text}
            choices.append(self._choice(index, content, self._wrap(self._logprobs[index]), self._ends[index]))
        kind = "chat.completion" if self._request.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self._request.is_chat else "cmpl"
        info = self._resolved[0].info
        return {
            "id": f"{prefix}-{self._request_id}",
            "object": kind,
            "created": self._created,
            "model": info.model_name,
            "system_fingerprint": info.artifact_digest or None,
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._request.is_chat else "text_completion"
        chunk = {**self._head(kind), "choices": choices}
        if self._request.includes_usage:
            chunk["usage"] = usage
        return chunk

    def _usage_so_far(self, index: int) -> dict[str, Any] | None:
        """Of one choice, for its chunk, when the client asked for that."""
        if not self._request.counts_chunks:
            return None
        prompt = len(self._resolved[index // self._num_samples].prompt_token_ids)
        end = self._ends.get(index)
        completion = self._counts[index] if end is None else end.usage.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    @staticmethod
    def _choice(index: int, content: dict[str, Any], logprobs: Any, end: SampleEnd | None) -> dict[str, Any]:
        reason, detail = _REASONS[end.reason] if end is not None else (None, None)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        if end is not None:
            choice["stop_reason"] = end.stop_string or detail
        return choice

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(resolved.prompt_token_ids) for resolved in self._resolved)
        completion = sum(end.usage.completion_tokens for end in self._ends.values())
        cached = [self._ends[index].usage.cached_tokens for index in range(len(self._texts))]
        n = self._num_samples
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            # A prompt's tokens are counted once, so are those of them that every sample found.
            "prompt_tokens_details": {
                "cached_tokens": sum(min(cached[first : first + n]) for first in range(0, len(cached), n))
            },
        }

    def _logprobs_of(self, index: int, update: SampleUpdate) -> list[Any]:
        """One entry a token, in the spelling of the endpoint; text offsets are set here, in order."""
        if not update.logprobs:
            return []
        pieces = self._vocabulary
        entries: list[Any] = []
        for token_id, entry in zip(update.token_ids, update.logprobs, strict=False):
            top = [
                (pieces.piece(i), p) for i, p in zip(entry.top_token_ids, entry.top_logprobs, strict=False)
            ]
            piece = pieces.piece(token_id)
            if self._request.is_chat:
                entries.append(
                    {**_token(piece, entry.logprob), "top_logprobs": [_token(b, p) for b, p in top]}
                )
            else:
                text = piece.decode("utf-8", "replace")
                offset = self._offsets[index]
                self._offsets[index] += len(text)
                # The drawn token is always among them: one more than asked for, when it is none of the top.
                named = {b.decode("utf-8", "replace"): p for b, p in top} | {text: entry.logprob}
                entries.append((text, entry.logprob, named, offset))
        return entries

    def _wrap(self, entries: list[Any]) -> dict[str, Any] | None:
        if not self._request.has_logprobs:
            return None
        if self._request.is_chat:
            return {"content": entries, "refusal": None}
        return {
            "tokens": [text for text, _, _, _ in entries],
            "token_logprobs": [logprob for _, logprob, _, _ in entries],
            "top_logprobs": [top for _, _, top, _ in entries],
            "text_offset": [offset for _, _, _, offset in entries],
        }


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}
