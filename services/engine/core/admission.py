"""The door of the core: which sequences are refused, and why.

Knows limits, blocks, who waits and what steps cost. Changes nothing and keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.core import ranks
from services.engine.core.block_manager import BlockManager
from services.engine.core.cost_model import CostModel
from services.engine.core.errors import DeadlineUnmet, DoesNotFit, InvalidRequest, QueueFull
from services.engine.core.scheduler import Scheduler
from services.engine.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """What is refused at the door. Lengths in tokens, `max_queue_size` in sequences."""

    vocab_size: int
    max_model_len: int
    max_queue_size: int = 512


class Admission:
    """Judges one sequence at a time."""

    def __init__(
        self, limits: CoreLimits, scheduler: Scheduler, blocks: BlockManager, costs: CostModel
    ) -> None:
        self._limits = limits
        self._scheduler = scheduler
        self._blocks = blocks
        self._costs = costs

    def check(self, sequence: Sequence, now: float) -> None:
        """Raises the RequestError that says why a sequence is not admitted. `now` in seconds of the core's
        clock.
        """
        self._check_tokens(sequence)
        total = len(sequence.prompt_token_ids) + sequence.params.max_tokens
        # The last token drawn is never computed, so its K and V need no slot.
        if self._blocks.blocks_for(total - 1) > self._blocks.num_blocks:
            raise DoesNotFit(
                f"prompt and max_tokens are {total} tokens; the KV cache holds "
                f"{self._blocks.num_blocks * self._blocks.block_size}"
            )
        if len(self._scheduler.waiting) >= self._limits.max_queue_size:
            raise QueueFull(f"{len(self._scheduler.waiting)} sequences are waiting", self._queue_s() or 1.0)
        if sequence.deadline is not None:
            self._check_deadline(sequence, now)

    def _check_tokens(self, sequence: Sequence) -> None:
        prompt, output = sequence.prompt_token_ids, sequence.output_token_ids
        limit, vocabulary = self._limits.max_model_len, self._limits.vocab_size
        if not prompt:
            raise InvalidRequest("prompt_token_ids", "the prompt is empty")
        for field, ids in (("prompt_token_ids", prompt), ("emitted_token_ids", output)):
            if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
                raise InvalidRequest(field, f"a token id is outside the vocabulary of {vocabulary}")
        if sequence.params.max_tokens < 1:
            raise InvalidRequest("sampling.max_tokens", "must be at least 1")
        if len(output) > sequence.params.max_tokens:
            raise InvalidRequest("emitted_token_ids", "are more than max_tokens")
        total = len(prompt) + sequence.params.max_tokens
        if total > limit:
            raise InvalidRequest(
                "sampling.max_tokens",
                f"prompt ({len(prompt)}) and max_tokens ({sequence.params.max_tokens}) are {total} tokens; "
                f"the model takes {limit}",
            )

    def _check_deadline(self, sequence: Sequence, now: float) -> None:
        """Refuse what cannot give one token in time, or all of them when it must complete."""
        num_cached = self._blocks.match(sequence).num_tokens(self._blocks.block_size)
        num_before = self._num_tokens_before(sequence, now)
        wait = self._costs.prefill_s(num_before + len(sequence) - num_cached) + self._costs.itl_s()
        if sequence.must_complete:
            wait += (sequence.params.max_tokens - sequence.num_output_tokens) * self._costs.itl_s()
        left = (sequence.deadline or 0.0) - now
        if left <= 0 or wait > left:
            raise DeadlineUnmet(f"{max(left, 0):.3f} s are left; about {wait:.3f} s are needed")

    def _num_tokens_before(self, sequence: Sequence, now: float) -> int:
        """Tokens to compute for those waiting sequences that would be placed before this one."""
        ageing_s = self._scheduler.config.ageing_s
        rank = ranks.aged_rank(sequence, now, ageing_s)
        return sum(
            s.num_uncomputed_tokens
            for s in self._scheduler.waiting
            if not s.is_paused and ranks.aged_rank(s, now, ageing_s) <= rank
        )

    def _queue_s(self) -> float:
        """How long the waiting prompts take to compute."""
        return self._costs.prefill_s(sum(s.num_uncomputed_tokens for s in self._scheduler.waiting))
