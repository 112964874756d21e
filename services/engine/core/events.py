"""What a step has to tell: plain data, on its way out of the core.

Keys are whatever the caller gave its sequences; the core never looks inside them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

from services.engine.core.block import BlockCounts
from services.engine.core.errors import RequestError
from services.engine.core.sequence import FinishReason

NO_BLOCKS = BlockCounts(0, 0, 0)


class TokenEvent(NamedTuple):
    """One new token. `position` counts from 0 over the whole completion, resumed tokens included. `ttft_s` is
    set on a sequence's first new token, `itl_s` on every later one but the first after a pause: seconds since
    submit, and since the token before.
    """

    key: Hashable
    token_id: int
    position: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    ttft_s: float | None
    itl_s: float | None


@dataclass(slots=True)
class Tokens:
    """New tokens in columns, in the order in which they were drawn: a step of a thousand makes a few lists,
    not a thousand objects. Iterating gives TokenEvents. What few rows have is kept by row: `ttfts_s`, and
    `logprobs` as (logprob, top_logprobs).
    """

    keys: list[Hashable] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    itls_s: list[float | None] = field(default_factory=list)
    ttfts_s: dict[int, float] = field(default_factory=dict)
    logprobs: dict[int, tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Iterable[TokenEvent]) -> Tokens:
        """The columns of events."""
        tokens = cls()
        for event in events:
            tokens.add(event)
        return tokens

    def add(self, event: TokenEvent) -> None:
        """One row more."""
        row = len(self.keys)
        self.keys.append(event.key)
        self.token_ids.append(event.token_id)
        self.positions.append(event.position)
        self.itls_s.append(event.itl_s)
        if event.ttft_s is not None:
            self.ttfts_s[row] = event.ttft_s
        if event.logprob is not None:
            self.logprobs[row] = event.logprob, event.top_logprobs

    def extend(self, other: Tokens, keys: SequenceABC[Hashable]) -> None:
        """The rows of others behind these, under other keys."""
        start = len(self.keys)
        self.keys += keys
        self.token_ids += other.token_ids
        self.positions += other.positions
        self.itls_s += other.itls_s
        self.ttfts_s |= {start + row: ttft_s for row, ttft_s in other.ttfts_s.items()}
        self.logprobs |= {start + row: logprobs for row, logprobs in other.logprobs.items()}

    def where(self, is_wanted: SequenceABC[bool]) -> Tokens:
        """The rows that are wanted."""
        new_rows = {row: new_row for new_row, row in enumerate(compress(range(len(self)), is_wanted))}
        return Tokens(
            list(compress(self.keys, is_wanted)),
            list(compress(self.token_ids, is_wanted)),
            list(compress(self.positions, is_wanted)),
            list(compress(self.itls_s, is_wanted)),
            {new_rows[row]: ttft_s for row, ttft_s in self.ttfts_s.items() if row in new_rows},
            {new_rows[row]: logprobs for row, logprobs in self.logprobs.items() if row in new_rows},
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[TokenEvent]:
        columns = zip(self.keys, self.token_ids, self.positions, self.itls_s, strict=True)
        for row, (key, token_id, position, itl_s) in enumerate(columns):
            logprob, top_logprobs = self.logprobs.get(row, (None, ()))
            ttft_s = self.ttfts_s.get(row)
            yield TokenEvent(key, token_id, position, logprob, top_logprobs, ttft_s, itl_s)


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end of one sequence; exactly one comes per admitted sequence. Times are seconds since submit."""

    key: Hashable
    reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    queue_s: float
    ttft_s: float | None
    total_s: float
    num_preemptions: int
    error: RequestError | None = None


class Counters(NamedTuple):
    """Totals since start. `begun` - `ended` is the number of live sequences, always."""

    begun: int = 0
    ended: int = 0
    steps: int = 0
    preemptions: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    peak_batch_size: int = 0


NO_COUNTERS = Counters()


@dataclass(slots=True)
class StepReport:
    """What happened since the report before. `num_batched_tokens` were computed by the steps that have been
    collected since; 0 when there was none.
    """

    step: int
    tokens: Tokens = field(default_factory=Tokens)
    finished: list[FinishedEvent] = field(default_factory=list)
    num_batched_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_paused: int = 0
    blocks: BlockCounts = NO_BLOCKS
    counters: Counters = NO_COUNTERS
