"""One artifact's requests as the dispatcher sees them: who waits, who runs, what they have drawn. Holds state
and counts; chooses nothing.
"""

from __future__ import annotations

import asyncio

from services.gateway.admission.fair_queue import Entry, FairQueue, KeyQueue
from services.gateway.routing.places import Places
from services.gateway.streams.live import LiveRequest
from weft.v1 import engine_service_pb2 as engine_pb

# Service in tokens, as in the paper on virtual token counters: one of output costs about as much as two of
# prompt.
PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
# While somebody waits, running requests are charged at most so often.
SETTLE_S = 0.02
SETTLE_EACH_S = 2e-5
# The pace of starts is the mean over about so many.
_MEMORY = 64


class Prefill:
    """A request that was sent and has no token yet. Refers to nothing of the request, so that the request may
    keep it.
    """

    __slots__ = ("_is_over", "_num_tokens", "_pool")

    def __init__(self, pool: Pool, num_tokens: int) -> None:
        self._pool = pool
        self._num_tokens = num_tokens
        self._is_over = False
        pool.num_in_prefill += 1
        pool.prefill_tokens += num_tokens

    def end(self) -> None:
        """It has its first token, or will have none. May come twice."""
        if not self._is_over:
            self._is_over = True
            self._pool.num_in_prefill -= 1
            self._pool.prefill_tokens -= self._num_tokens


class Turn:
    """One request, from when it asks to start until it is over. `leave` may come twice."""

    __slots__ = (
        "charged",
        "entry",
        "has_begun",
        "has_waited",
        "key",
        "live",
        "num_drawn_before",
        "pool",
        "prefill",
        "queued_at",
        "timer",
    )

    def __init__(self, pool: Pool, key: KeyQueue[Turn], live: LiveRequest, now: float) -> None:
        self.pool = pool
        self.key = key
        self.live = live
        self.queued_at = now
        # What it had drawn before, if it goes on with a request that had ended, was charged then.
        self.charged = self.num_drawn_before = num_drawn(live)
        self.has_begun = False
        self.has_waited = False
        self.prefill: Prefill | None = None
        self.entry: Entry[Turn] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def used(self) -> tuple[int, int]:
        """The prompt tokens that an engine was given, once for all samples, and the output tokens drawn."""
        if not self.has_begun:
            return 0, 0
        return len(self.live.resolved.prompt_token_ids), num_drawn(self.live) - self.num_drawn_before

    def leave(self) -> None:
        """The request is over, or no longer wants to start."""
        self.pool.leave(self)

    def settle(self) -> None:
        """Charge the output drawn since the last time."""
        drawn = num_drawn(self.live)
        if drawn > self.charged:
            self.pool.queue.charge(self.key, OUTPUT_WEIGHT * (drawn - self.charged))
            self.charged = drawn


class Pool:
    """The engines of one artifact as seen from here: who waits for them, who runs on them, at what pace they
    take requests.
    """

    def __init__(self, info: engine_pb.GetInfoResponse, ageing_s: float) -> None:
        self.info = info
        self.queue: FairQueue[Turn] = FairQueue(ageing_s=ageing_s)
        self.running: set[Turn] = set()
        self.num_in_prefill = 0
        self.prefill_tokens = 0
        self.settled_at = 0.0
        self.no_engine_since: float | None = None
        self._started_at: float | None = None
        self._gap_s = 0.0
        self._num_gaps = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.running and not len(self.queue)

    def has_room(self, places: Places) -> bool:
        """Whether one more request may be sent. Free places in a batch are not enough: an engine without
        blocks, or with a queue of prompts, would only have it wait in an order that knows no keys.
        """
        is_prefilling = (
            self.num_in_prefill >= places.num_ahead and self.prefill_tokens >= places.num_prompt_tokens
        )
        return places.num_sequences > 0 and not is_prefilling

    def begin(self, turn: Turn) -> Prefill:
        """The turn has come: charge the prompt."""
        num_tokens = len(turn.live.resolved.prompt_token_ids)
        self.queue.charge(turn.key, PROMPT_WEIGHT * num_tokens)
        turn.has_begun = True
        self.running.add(turn)
        turn.prefill = Prefill(self, num_tokens)
        return turn.prefill

    def leave(self, turn: Turn) -> None:
        """The turn is over."""
        if turn.prefill is not None:
            turn.prefill.end()
        if turn.timer is not None:
            turn.timer.cancel()
            turn.timer = None
        if turn.entry is not None:
            self.queue.remove(turn.entry)
            # The queue may hold the entry for a while, and a prompt can be large.
            del turn.entry.item
            turn.entry = None
        if turn in self.running:
            self.running.discard(turn)
            turn.settle()

    def settle(self, now: float) -> None:
        """Charge what the running requests have drawn, unless that was done a moment ago. Many requests
        lengthen the moment, so that this stays a small share of the time; who waits alone passes nobody.
        """
        if len(self.queue) > 1 and now - self.settled_at >= SETTLE_S + len(self.running) * SETTLE_EACH_S:
            self.settled_at = now
            for turn in self.running:
                turn.settle()

    def note_start(self, now: float) -> None:
        """One has started out of the queue. The gap to the next one counts only if somebody waits for it."""
        if self._started_at is not None:
            self._num_gaps = min(self._num_gaps + 1, _MEMORY)
            self._gap_s += (now - self._started_at - self._gap_s) / self._num_gaps
        self._started_at = now if len(self.queue) else None

    def wait_s(self, key: KeyQueue[Turn], rank: int) -> float:
        """About how long a request that this key queued now would wait; 0 while the pace is not known."""
        return (self.queue.num_before(key, rank) + 1) * self._gap_s if self._num_gaps else 0.0


def num_drawn(live: LiveRequest) -> int:
    """Output tokens that engines drew for a request, delivered or not."""
    return sum(len(sample.token_ids) for sample in live.samples)
