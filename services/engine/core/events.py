"""What a step has to tell: plain data, on its way out of the core.

Keys are whatever the caller gave its sequences; the core never looks inside them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
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


token_event = partial(tuple.__new__, TokenEvent)
"""Makes a TokenEvent of a tuple of all its fields in half the time: every token costs one."""


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
    tokens: list[TokenEvent] = field(default_factory=list)
    finished: list[FinishedEvent] = field(default_factory=list)
    num_batched_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_paused: int = 0
    blocks: BlockCounts = NO_BLOCKS
    counters: Counters = NO_COUNTERS
