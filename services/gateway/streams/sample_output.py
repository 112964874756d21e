"""One sample's output: token ids in, text out, and what to count.

Joins detokenizer and stop strings. Knows nothing of engines, clients or time.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.text.detokenizer import Detokenizer, Vocabulary
from services.gateway.text.stops import StopMatcher


class SampleOutput:
    """Takes tokens one by one; gives the text that may go out.

    `terminal_ids` end the output, so their text is not part of it. Stops are honoured once more than
    `min_tokens` tokens are out, which is when the engine honours an end token. `num_tokens` counts through
    the token that completed a match; tokens after it are counted in `num_discarded`. `num_bytes` is the
    length of all text given out.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        terminal_ids: frozenset[int] = frozenset(),
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(vocabulary, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops) if stops else None
        self._min_tokens = min_tokens
        self._terminal_ids = terminal_ids
        # Read them, but let `take` empty it.
        self.pending_ids: list[int] = []
        self._pending_text: list[str] = []
        self.num_tokens = 0
        self.num_discarded = 0
        self.num_bytes = 0
        self.stop: str | None = None

    def push(self, token_id: int) -> bool:
        """Take the next token. True when it completed a stop string, or one was completed before."""
        if self.stop is not None:
            self.num_discarded += 1
            return True
        self.num_tokens += 1
        self.pending_ids.append(token_id)
        if self._matcher is None:
            return False
        is_armed = self.num_tokens > self._min_tokens
        text = "" if is_armed and token_id in self._terminal_ids else self._detokenizer.push((token_id,))
        if text:
            pushed = self._matcher.push(text, is_armed=is_armed)
            self._pending_text.append(pushed.text)
            self.stop = pushed.stop
        return self.stop is not None

    @property
    def num_pending(self) -> int:
        """Tokens that `take` has not given out."""
        return len(self.pending_ids)

    def take(self) -> tuple[str, list[int]]:
        """The text and the tokens since the last call."""
        ids, self.pending_ids = self.pending_ids, []
        if self._matcher is None:
            text = self._detokenize(ids)
        else:
            text = "".join(self._pending_text)
            self._pending_text.clear()
        self.num_bytes += len(text) if text.isascii() else len(text.encode("utf-8"))
        return text, ids

    def finish(self) -> tuple[str, list[int]]:
        """Like `take`, with what was held back: no more tokens will come."""
        text, ids = self.take()
        rest = ""
        if self.stop is None:
            rest = self._detokenizer.finish()
            if self._matcher is not None:
                rest = self._matcher.push(rest, is_armed=False).text + self._matcher.finish()
        self.num_bytes += len(rest.encode("utf-8"))
        return text + rest, ids

    def _detokenize(self, ids: list[int]) -> str:
        """A terminal token is the last one if it is one at all: it was drawn when stops were honoured."""
        if ids and ids[-1] in self._terminal_ids and self.num_tokens > self._min_tokens:
            ids = ids[:-1]
        return self._detokenizer.push(ids)
