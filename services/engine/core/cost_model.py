"""How long a step takes: learned online from the steps that ran.

A step costs a fixed part plus a part per token; old steps count ever less. Knows no clock.
"""

from __future__ import annotations

SMOOTHING = 0.1
MIN_LEARNED_TOKENS = 64
"""Fewer tokens than this say little about more: what they took is taken for what so many take."""
MIN_BOUND_S = 2.0
"""No step counts as hung before this: page faults and noisy neighbours are not faults."""
FIRST_STEP_BOUND_S = 60.0
"""Before a decode and a prefill have been seen, libraries may still be compiling."""
BOUND_FACTOR = 4.0


class CostModel:
    """Estimates step times. Before the first observation all are 0: nothing is refused on a guess."""

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._prefill_s = 0.0
        self._prefill_tokens = 0.0

    def observe(self, num_tokens: int, num_sequences: int, duration_s: float) -> None:
        """Learn from one step. A step of decodes alone teaches the fixed part, any larger one the part per
        token.
        """
        if num_tokens <= num_sequences:
            old = duration_s if self._decode_s is None else self._decode_s
            self._decode_s = old + SMOOTHING * (duration_s - old)
            return
        # Sums rather than an average of quotients: a long step weighs more than a short one.
        fixed = min(self._decode_s or 0.0, duration_s)
        self._prefill_s += duration_s - fixed - SMOOTHING * self._prefill_s
        self._prefill_tokens += num_tokens - SMOOTHING * self._prefill_tokens

    def itl_s(self) -> float:
        """The gap between tokens of a running sequence."""
        return self._decode_s or 0.0

    def prefill_s(self, num_tokens: int) -> float:
        """The time to compute this many prompt tokens."""
        return num_tokens * self._prefill_s / max(self._prefill_tokens, MIN_LEARNED_TOKENS)

    def tokens_per_second(self) -> float:
        """The pace of prefill; 0 before any was seen."""
        prefill_s = self.prefill_s(MIN_LEARNED_TOKENS)
        return MIN_LEARNED_TOKENS / prefill_s if prefill_s > 0 else 0.0

    def step_bound_s(self, num_tokens: int) -> float:
        """After this long a step of `num_tokens` tokens counts as hung."""
        if self._decode_s is None or not self._prefill_tokens:
            return FIRST_STEP_BOUND_S
        return max(MIN_BOUND_S, BOUND_FACTOR * (self.itl_s() + self.prefill_s(num_tokens)))
