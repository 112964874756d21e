"""The engine's heart: schedule, execute, update.

One thread owns it. It admits sequences, steps them, and tells what happened; every way out of a sequence
passes `_finish`. It knows neither tensors (the runner's) nor clients (the loop's).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from time import monotonic

from services.engine.core.admission import Admission, CoreLimits
from services.engine.core.batch import Runner, SampledToken
from services.engine.core.block_manager import BlockManager
from services.engine.core.cost_model import CostModel
from services.engine.core.errors import (
    DeadlineUnmet,
    Draining,
    DuplicateRequest,
    InternalFailure,
    RequestError,
)
from services.engine.core.events import Counters, FinishedEvent, StepReport, TokenEvent
from services.engine.core.executor import Executor, Outputs
from services.engine.core.scheduler import Batch, Scheduler
from services.engine.core.sequence import FinishReason, Sequence

log = logging.getLogger("weft.engine.core")

MIN_DEADLINE_MARGIN_S = 0.05
"""A stream is ended this long before its deadline, or two gaps between tokens, so that its last message
arrives.
"""


class EngineCore:
    """A continuous batch over one runner. `now` is a monotonic clock in seconds."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        blocks: BlockManager,
        limits: CoreLimits,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self.now = now
        self.scheduler = scheduler
        self.blocks = blocks
        self.costs = CostModel()
        self._admission = Admission(limits, scheduler, blocks, self.costs)
        self.step_started_at: float | None = None
        self.step_bound_s = self.costs.step_bound_s(0)
        self.is_draining = False
        self._runner = runner
        self._executor = Executor(runner)
        self._live: dict[Hashable, Sequence] = {}
        self._finished: list[FinishedEvent] = []
        self._num_steps = self._num_begun = self._num_ended = 0
        self._num_prompt_tokens = self._num_generation_tokens = self._peak_batch_size = 0

    # -- commands ------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Admit a sequence, or raise the RequestError that says why not; then nothing of it is kept."""
        if not sequence.arrival:
            sequence.arrival = self.now()
        try:
            if self.is_draining:
                raise Draining("the engine is draining")
            if sequence.key in self._live:
                raise DuplicateRequest(f"{sequence.key!r} is live already")
            self._admission.check(sequence, self.now())
        except RequestError:
            raise
        except Exception as error:
            failure = InternalFailure("admit", error)
            self._log_failure(sequence, failure)
            raise failure from error
        self._live[sequence.key] = sequence
        self._num_begun += 1
        self._num_prompt_tokens += len(sequence.prompt_token_ids)
        self.scheduler.add(sequence)
        reason = sequence.stop_reason()
        if reason is not None:  # A resume of what had already ended.
            self._finish(sequence, reason)

    def cancel(self, key: Hashable) -> None:
        """End a sequence. Unknown keys are ignored: its end has crossed this command."""
        sequence = self._live.get(key)
        if sequence is not None:
            self._finish(sequence, FinishReason.CANCELLED)

    def update(self, key: Hashable, *, priority: int | None = None, deadline: float | None = None) -> None:
        """Change a live sequence's priority or deadline; None leaves it."""
        sequence = self._live.get(key)
        if sequence is None:
            return
        if priority is not None:
            sequence.priority = priority
        if deadline is not None:
            sequence.deadline = deadline
        self.scheduler.reorder()

    def set_paused(self, key: Hashable, is_paused: bool) -> None:
        """Stop, or go on, scheduling a sequence."""
        sequence = self._live.get(key)
        if sequence is not None:
            sequence.is_paused = is_paused
            sequence.last_token_at = None  # The pause is no gap between two tokens.

    def abort_all(self, reason: FinishReason, error: RequestError | None = None) -> None:
        """End everything that is live."""
        for sequence in list(self._live.values()):
            self._finish(sequence, reason, error)

    @property
    def num_live(self) -> int:
        """Sequences admitted and not ended."""
        return len(self._live)

    def has_work(self) -> bool:
        """Whether a step could do anything now: something runnable, or an end to report."""
        return bool(self._finished) or self.scheduler.has_runnable()

    # -- the step ------------------------------------------------------------

    def step(self) -> StepReport:
        """Run one step. Raises DeviceFault when the device is beyond repair; any other failure ends one
        sequence.
        """
        self.step_bound_s = self.costs.step_bound_s(0)
        self.step_started_at = self.now()
        try:
            self._end_late()
            batch = self.scheduler.schedule(self.now())
            outputs = self._execute(batch)
            return self._update(batch, outputs)
        finally:
            self.step_started_at = None

    def report(self) -> StepReport:
        """The state now, with the ends that no step has told yet."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        finished, self._finished = self._finished, []
        return StepReport(
            step=self._num_steps,
            finished=finished,
            num_running=len(running),
            num_waiting=len(waiting),
            num_paused=sum(s.is_paused for s in self._live.values()),
            blocks=self.blocks.counts(),
            counters=Counters(
                begun=self._num_begun,
                ended=self._num_ended,
                steps=self._num_steps,
                preemptions=self.scheduler.num_preemptions,
                cache_queries=self.scheduler.num_cache_queries,
                cache_hits=self.scheduler.num_cache_hits,
                prompt_tokens=self._num_prompt_tokens,
                generation_tokens=self._num_generation_tokens,
                peak_batch_size=self._peak_batch_size,
            ),
        )

    def check_integrity(self) -> None:
        """Recount blocks and sequences. Raises IntegrityError."""
        self.blocks.check_integrity(self._live.values())

    def _execute(self, batch: Batch) -> Outputs:
        """Run the batch, learn from the time it took, and let the sources of its copies go."""
        if not batch.chunks:
            return {}
        self._num_steps += 1
        self._peak_batch_size = max(self._peak_batch_size, len(batch.chunks))
        self.step_bound_s = self.costs.step_bound_s(batch.num_tokens)
        started = self.now()
        try:
            outputs = self._executor.run(batch)
        finally:
            for copy in batch.copies:
                self.blocks.finish_copy(copy)
        self.costs.observe(batch.num_tokens, len(batch.chunks), self.now() - started)
        return outputs

    # -- update ------------------------------------------------------------

    def _update(self, batch: Batch, outputs: Outputs) -> StepReport:
        """Commit what was computed, hand out tokens, end what is done."""
        now = self.now()
        tokens: list[TokenEvent] = []
        for i, chunk in enumerate(batch.chunks):
            sequence, output = chunk.sequence, outputs[i]
            if isinstance(output, Exception):
                self._fail(sequence, "sample", output)
                continue
            try:
                self.blocks.commit(sequence, chunk.length)
                if output is not None:
                    tokens.append(self._emit(sequence, output, now))
            except Exception as error:
                self._fail(sequence, "emit", error)
                continue
            if output is not None:
                reason = sequence.stop_reason()
                if reason is not None:
                    self._finish(sequence, reason)
        report = self.report()
        report.tokens = tokens
        report.num_batched_tokens = batch.num_tokens
        return report

    def _emit(self, sequence: Sequence, token: SampledToken, now: float) -> TokenEvent:
        ttft_s = itl_s = None
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            ttft_s = now - sequence.arrival
        elif sequence.last_token_at is not None:
            sequence.last_itl_s = itl_s = now - sequence.last_token_at
        position = len(sequence.output_token_ids)
        event = TokenEvent(
            sequence.key, token.token_id, position, token.logprob, token.top_logprobs, ttft_s, itl_s
        )
        sequence.append(token.token_id)
        sequence.last_token_at = now
        self._num_generation_tokens += 1
        return event

    # -- the ends ------------------------------------------------------------

    def _fail(self, sequence: Sequence, stage: str, error: Exception) -> None:
        failure = error if isinstance(error, RequestError) else InternalFailure(stage, error)
        self._log_failure(sequence, failure)
        self._finish(sequence, FinishReason.ERROR, failure)

    @staticmethod
    def _log_failure(sequence: Sequence, failure: RequestError) -> None:
        extra = {"key": repr(sequence.key)}
        cause: BaseException = failure
        if isinstance(failure, InternalFailure):
            extra["error_id"], cause = failure.error_id, failure.cause
        log.error("sequence failed: %s", failure, exc_info=cause, extra=extra)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: RequestError | None = None) -> None:
        """The one way out: blocks released, runner told, the end counted and reported, whatever fails on the
        way.
        """
        try:
            self.scheduler.remove(sequence, is_sound=not isinstance(error, InternalFailure))
            self._runner.forget(sequence)
        finally:
            del self._live[sequence.key]
            self._num_ended += 1
            sequence.finish_reason = reason
            self._finished.append(self._end_event(sequence, reason, error))

    def _end_event(
        self, sequence: Sequence, reason: FinishReason, error: RequestError | None
    ) -> FinishedEvent:
        now = self.now()
        scheduled = now if sequence.first_scheduled_at is None else sequence.first_scheduled_at
        first = sequence.first_token_at
        return FinishedEvent(
            key=sequence.key,
            reason=reason,
            num_prompt_tokens=len(sequence.prompt_token_ids),
            num_output_tokens=len(sequence.output_token_ids),
            num_cached_tokens=sequence.num_cached_tokens,
            queue_s=scheduled - sequence.arrival,
            ttft_s=None if first is None else first - sequence.arrival,
            total_s=now - sequence.arrival,
            num_preemptions=sequence.num_preemptions,
            error=error,
        )

    def _end_late(self) -> None:
        """End what is past its deadline, or so near that its last message would come too late."""
        now = self.now()
        for sequence in [s for s in self._live.values() if s.deadline is not None]:
            margin = max(MIN_DEADLINE_MARGIN_S, 2 * sequence.last_itl_s) if sequence.output_token_ids else 0.0
            if now < (sequence.deadline or 0.0) - margin:
                continue
            error = (
                None
                if sequence.output_token_ids
                else DeadlineUnmet("the deadline passed before the first token")
            )
            self._finish(sequence, FinishReason.DEADLINE, error)
