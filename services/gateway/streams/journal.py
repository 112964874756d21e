"""What one sample has drawn and what of it was sent, so that a reader who comes back can go on.

Text is not kept: it is a function of the tokens, so `Replay` makes it again. Knows no time and no network.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

from services.gateway.streams.sample_output import SampleOutput
from weft.v1 import engine_service_pb2 as engine_pb

# A replay gives out so many tokens at a time, like a reader that was slow.
REPLAY_TOKENS = 256
BYTES_PER_TOKEN = 4
BYTES_PER_OFFSET = 12


class Journal:
    """The tokens of one sample, and the places where a reader may go on.

    A place is an offset that was sent, with the tokens that were out when it was first reached: tokens that
    came without text after it come again, so that none is lost. `num_sent` tokens and `sent_offset` bytes
    are out. Offsets are kept only with `keeps_offsets`; without it the last place is the only one, and
    log-probabilities that were sent are dropped.
    """

    __slots__ = (
        "_counts",
        "_first_logprob",
        "_logprobs",
        "_offsets",
        "most_sent",
        "num_sent",
        "sent_offset",
        "token_ids",
    )

    def __init__(self, *, keeps_offsets: bool = False) -> None:
        # 4 bytes a token: a list of integers takes nine times that.
        self.token_ids: array[int] = array("I")
        self.num_sent = 0
        # Of all readers' tokens, the most that were sent.
        self.most_sent = 0
        self.sent_offset = 0
        self._offsets: array[int] | None = array("Q") if keeps_offsets else None
        self._counts = array("I")
        self._logprobs: list[engine_pb.EntryLogprobs] = []
        self._first_logprob = 0

    def copy(self) -> Journal:
        """The same, to be gone on with elsewhere."""
        other = Journal()
        other.token_ids = self.token_ids[:]
        other.num_sent, other.sent_offset = self.num_sent, self.sent_offset
        other.most_sent = self.most_sent
        other._offsets = self._offsets[:] if self._offsets is not None else None
        other._counts = self._counts[:]
        other._logprobs = self._logprobs[:]
        other._first_logprob = self._first_logprob
        return other

    @property
    def num_bytes(self) -> int:
        """About how much memory this takes."""
        num_offsets = len(self._offsets) if self._offsets is not None else 0
        # An entry's own size on the wire is near a third of what it takes in memory.
        logprobs = len(self._logprobs) * (3 * self._logprobs[0].ByteSize() + 64) if self._logprobs else 0
        return 512 + BYTES_PER_TOKEN * len(self.token_ids) + BYTES_PER_OFFSET * num_offsets + logprobs

    def add_logprobs(self, logprobs: engine_pb.EntryLogprobs) -> None:
        """Those of the next visible token."""
        self._logprobs.append(logprobs)

    def logprobs(self, start: int, stop: int) -> list[engine_pb.EntryLogprobs]:
        """Those of tokens `start` to `stop`; none when they were not asked for."""
        if not self._logprobs:
            return []
        first = self._first_logprob
        found = self._logprobs[max(0, start - first) : max(0, stop - first)]
        if self._offsets is None and self.num_sent > first:
            del self._logprobs[: self.num_sent - first]
            self._first_logprob = self.num_sent
        return found

    def sent(self, num_tokens: int, offset: int) -> None:
        """So many more tokens are on their way to the reader, and the text up to `offset`."""
        self.num_sent += num_tokens
        self.most_sent = max(self.most_sent, self.num_sent)
        if offset == self.sent_offset:
            return
        self.sent_offset = offset
        offsets = self._offsets
        if offsets is None:
            return
        index = bisect_left(offsets, offset)
        if index < len(offsets) and offsets[index] == offset:
            self._counts[index] = self.num_sent
        else:
            offsets.insert(index, offset)
            self._counts.insert(index, self.num_sent)

    def tokens_at(self, offset: int) -> int | None:
        """The tokens that were out when `offset` was reached, or None when it was never sent. 0 is the
        beginning.
        """
        if offset == 0:
            return 0
        offsets = self._offsets
        if offsets is None:
            return self.num_sent if offset == self.sent_offset else None
        index = bisect_left(offsets, offset)
        is_known = index < len(offsets) and offsets[index] == offset
        return self._counts[index] if is_known else None

    def rewind(self, num_tokens: int, offset: int) -> None:
        """A reader begins at this place."""
        self.num_sent, self.sent_offset = num_tokens, offset


class Replay:
    """The output of a sample once more, from a place on. `output` must be new."""

    def __init__(self, output: SampleOutput, token_ids: Sequence[int], num_tokens: int, offset: int) -> None:
        self._output = output
        self._token_ids = token_ids
        self.num_tokens = num_tokens
        for token_id in token_ids[:num_tokens]:
            output.push(token_id)
        output.take()
        # Text at the very end, which was held back until then, may have been sent with the last place.
        self._num_known = offset - output.num_bytes

    def take(self, limit: int, *, is_ended: bool) -> tuple[str, list[int], int]:
        """Text, tokens and the offset after them: at most `REPLAY_TOKENS` more, none at or past `limit`. With
        `is_ended` the text held back comes with the last ones.
        """
        stop = min(self.num_tokens + REPLAY_TOKENS, limit)
        for token_id in self._token_ids[self.num_tokens : stop]:
            self._output.push(token_id)
        self.num_tokens = stop
        text, token_ids = self._output.finish() if is_ended and stop == limit else self._output.take()
        if self._num_known and text:
            data = text.encode("utf-8")
            text = data[self._num_known :].decode("utf-8", "replace")
            self._num_known = max(0, self._num_known - len(data))
        return text, token_ids, self._output.num_bytes
