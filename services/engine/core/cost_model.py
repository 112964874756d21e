"""How long a step takes: learned online from the steps that ran.

A step costs a fixed part plus a part per token; both are exponentially weighted averages. Knows no clock.
"""

from __future__ import annotations

SMOOTHING = 0.1
MIN_BOUND_S = 2.0
"""No step counts as hung before this: page faults and noisy neighbours are not faults."""
FIRST_STEP_BOUND_S = 60.0
"""Before any step has been seen, libraries may still be compiling."""
BOUND_FACTOR = 4.0


class CostModel:
    """Estimates step times. Before the first observation all are 0: nothing is refused on a guess."""

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._token_s: float | None = None

    def observe(self, num_tokens: int, num_sequences: int, duration_s: float) -> None:
        """Learn from one step. A step of decodes alone teaches the fixed part, any larger one the part per
        token.
        """
        if num_tokens <= num_sequences:
            self._decode_s = _average(self._decode_s, duration_s)
            return
        fixed = min(self._decode_s or 0.0, duration_s)
        self._token_s = _average(self._token_s, (duration_s - fixed) / num_tokens)

    def itl_s(self) -> float:
        """The gap between tokens of a running sequence."""
        return self._decode_s or 0.0

    def prefill_s(self, num_tokens: int) -> float:
        """The time to compute this many prompt tokens."""
        return num_tokens * (self._token_s or 0.0)

    def step_bound_s(self, num_tokens: int) -> float:
        """After this long a step of `num_tokens` tokens counts as hung."""
        if self._decode_s is None and self._token_s is None:
            return FIRST_STEP_BOUND_S
        return max(MIN_BOUND_S, BOUND_FACTOR * (self.itl_s() + self.prefill_s(num_tokens)))


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
