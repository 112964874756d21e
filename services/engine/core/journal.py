"""What has happened and has not been told yet, and the totals since start.

Knows sequences and times. Does not know who is told, nor what a step is.
"""

from __future__ import annotations

from services.engine.core.batch import SampledToken
from services.engine.core.block_manager import BlockManager
from services.engine.core.errors import RequestError
from services.engine.core.events import Counters, FinishedEvent, StepReport, Tokens
from services.engine.core.scheduler import Scheduler
from services.engine.core.sequence import FinishReason, Sequence


class Journal:
    """Written by the core as things happen; `report` hands out what is new."""

    def __init__(self) -> None:
        self.num_paused = 0
        self.num_begun = 0
        self.num_ended = 0
        self.tokens = Tokens()
        self._finished: list[FinishedEvent] = []
        self._num_batched_tokens = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._peak_batch_size = 0

    def begin(self, sequence: Sequence) -> None:
        """A sequence was admitted."""
        self.num_begun += 1
        self.num_paused += sequence.is_paused
        self._num_prompt_tokens += len(sequence.prompt_token_ids)

    def step(self, num_tokens: int, num_sequences: int) -> None:
        """A step was collected."""
        self._num_steps += 1
        self._num_batched_tokens += num_tokens
        self._peak_batch_size = max(self._peak_batch_size, num_sequences)

    def token(self, sequence: Sequence, token: SampledToken, now: float) -> None:
        """A token was drawn; the sequence does not have it yet."""
        tokens, itl_s = self.tokens, None
        if sequence.last_token_at is not None:
            sequence.last_itl_s = itl_s = now - sequence.last_token_at
        elif sequence.first_token_at is None:
            sequence.first_token_at = now
            tokens.ttfts_s[len(tokens.keys)] = now - sequence.arrival
        if token.logprob is not None:
            tokens.logprobs[len(tokens.keys)] = token.logprob, token.top_logprobs
        sequence.last_token_at = now
        tokens.keys.append(sequence.key)
        tokens.token_ids.append(token.token_id)
        tokens.positions.append(sequence.num_output_tokens)
        tokens.itls_s.append(itl_s)

    def end(self, sequence: Sequence, error: RequestError | None, now: float) -> None:
        """A sequence has ended, with its `finish_reason`."""
        self.num_ended += 1
        self.num_paused -= sequence.is_paused
        scheduled = now if sequence.first_scheduled_at is None else sequence.first_scheduled_at
        first = sequence.first_token_at
        event = FinishedEvent(
            key=sequence.key,
            reason=sequence.finish_reason or FinishReason.ERROR,
            num_prompt_tokens=len(sequence.prompt_token_ids),
            num_output_tokens=sequence.num_output_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            queue_s=scheduled - sequence.arrival,
            ttft_s=None if first is None else first - sequence.arrival,
            total_s=now - sequence.arrival,
            num_preemptions=sequence.num_preemptions,
            error=error,
        )
        self._finished.append(event)

    @property
    def has_news(self) -> bool:
        """Whether a token or an end has not been told."""
        return bool(self.tokens or self._finished)

    def report(self, scheduler: Scheduler, blocks: BlockManager) -> StepReport:
        """The state now, with the tokens and ends that no report has told yet."""
        self._num_generation_tokens += len(self.tokens)
        report = StepReport(
            step=self._num_steps,
            tokens=self.tokens,
            finished=self._finished,
            num_batched_tokens=self._num_batched_tokens,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_paused=self.num_paused,
            blocks=blocks.counts(),
            counters=Counters(
                begun=self.num_begun,
                ended=self.num_ended,
                steps=self._num_steps,
                preemptions=scheduler.num_preemptions,
                cache_queries=scheduler.num_cache_queries,
                cache_hits=scheduler.num_cache_hits,
                prompt_tokens=self._num_prompt_tokens,
                generation_tokens=self._num_generation_tokens,
                peak_batch_size=self._peak_batch_size,
            ),
        )
        self.tokens, self._finished, self._num_batched_tokens = Tokens(), [], 0
        return report
