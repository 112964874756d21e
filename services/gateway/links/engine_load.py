"""How busy one engine is, and when it would give a new request its first token. Pure: it is told the time.

Put together from the engine's heartbeats, which count the work of every gateway, and from what this gateway
has sent since the last of them. Knows no link.
"""

from __future__ import annotations

from weft.v1 import engine_service_pb2 as engine_pb

UNBOUNDED = 1 << 30
SMOOTHING = 0.1
# A frame that comes later than this after the one before it says nothing about the step.
MAX_STEP_S = 2.0
# How long a place in a full batch takes to come free, before the first has.
GUESSED_PLACE_S = 0.1


class EngineLoad:
    """One engine, for as long as one link to it stands. Times are in seconds of one monotonic clock."""

    def __init__(self, info: engine_pb.GetInfoResponse) -> None:
        # An engine that states no batch is taken to have room for all.
        self.max_batch_size = info.max_batch_size or UNBOUNDED
        self.max_queue_size = info.max_queue_size if info.max_batch_size else 0
        self.tokens_per_second = 0.0
        self.free_blocks: int | None = None
        self.has_idle_beats = False
        # Sequences of all gateways that waited there at the last heartbeat, less what has made room since.
        self.num_waiting = 0
        self._block_size = info.block_size
        self._waiting_tokens = 0
        self._sent_tokens = 0
        self._num_others = 0
        # How long a step took lately; 0 while none was seen.
        self.step_s = 0.0
        self._frame_at: float | None = None
        self._place_s = GUESSED_PLACE_S
        self._freed_at: float | None = None

    def beat(self, beat: engine_pb.Heartbeat, num_live: int) -> None:
        """A heartbeat came while `num_live` sequences of this gateway were there."""
        self._num_others = max(0, beat.running + beat.waiting - num_live)
        self.num_waiting = beat.waiting
        self._waiting_tokens = beat.waiting_tokens
        self._sent_tokens = 0
        self.tokens_per_second = beat.tokens_per_second
        if beat.running or beat.waiting or beat.free_blocks:
            self.free_blocks = beat.free_blocks
        if not num_live:
            self.has_idle_beats = True

    def sent(self, num_tokens: int) -> None:
        """A request of so many tokens was sent."""
        self._sent_tokens += num_tokens

    def frame(self, now: float) -> None:
        """A frame came: the gap to the one before it is about a step."""
        if self._frame_at is not None and 0.0 < (gap_s := now - self._frame_at) < MAX_STEP_S:
            self.step_s += SMOOTHING * (gap_s - self.step_s) if self.step_s else gap_s
        self._frame_at = now

    def rest(self) -> None:
        """No sequence is live: the time until the next frame is no step."""
        self._frame_at = self._freed_at = None

    def freed(self, now: float) -> None:
        """A sequence has ended."""
        self.num_waiting = max(0, self.num_waiting - 1)
        if self._freed_at is not None:
            self._place_s += SMOOTHING * (now - self._freed_at - self._place_s)
        self._freed_at = now

    def num_sequences(self, num_live: int) -> int:
        """Sequences on the engine when `num_live` are ours: other gateways' are counted too."""
        return num_live + self._num_others

    def room(self, num_live: int) -> int:
        """Sequences that would start without queueing."""
        return max(0, self.max_batch_size - self.num_sequences(num_live))

    def is_full(self, num_live: int) -> bool:
        """Whether the engine would refuse another one."""
        is_queue_full = 0 < self.max_queue_size <= self.num_waiting
        return is_queue_full or self.num_sequences(num_live) >= self.max_batch_size + self.max_queue_size

    def starts_at_once(self, num_live: int, num_tokens: int) -> bool:
        """Whether a request of `num_tokens` tokens would find a place in the batch, and blocks."""
        if self.num_waiting or not self.room(num_live):
            return False
        if self.free_blocks is None or not self._block_size:
            return True
        return num_tokens + self._sent_tokens < self.free_blocks * self._block_size

    def first_token_s(self, num_live: int, num_tokens: int) -> float:
        """The estimated time until a request of `num_tokens` uncomputed tokens has its first one: the prefill
        before it and its own, and the places that must come free. The step comes on top: see `step_s`.
        """
        num_before = max(0, self.num_sequences(num_live) + 1 - self.max_batch_size)
        to_compute = self._waiting_tokens + self._sent_tokens + num_tokens
        return self.prefill_s(to_compute) + num_before * self._place_s

    def prefill_s(self, num_tokens: int) -> float:
        """The time to compute so many prompt tokens; 0 while the pace is not known."""
        return num_tokens / self.tokens_per_second if self.tokens_per_second > 0 else 0.0
