"""The engine's heart: launch a step, collect a step, report.

One thread owns it. It admits sequences, steps them, and tells what happened; every way out of a sequence
passes `_finish`. Over a runner that can overlap, a step is launched before the tokens of the one before it
are collected, so that the device need not wait for the host. It knows neither tensors (the runner's) nor
clients (the loop's).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from time import monotonic

from services.engine.core.admission import Admission, CoreLimits
from services.engine.core.batch import Batch, Chunk, ForwardRunner, Runner, as_runner
from services.engine.core.block_manager import BlockManager
from services.engine.core.cost_model import CostModel
from services.engine.core.deadlines import Deadlines
from services.engine.core.decodes import take_decodes
from services.engine.core.errors import (
    DeadlineUnmet,
    Draining,
    DuplicateRequest,
    IntegrityError,
    InternalFailure,
    RequestError,
)
from services.engine.core.events import StepReport
from services.engine.core.executor import Executor, Output, Step
from services.engine.core.journal import Journal
from services.engine.core.scheduler import Scheduler
from services.engine.core.sequence import FinishReason, Sequence, SequenceStatus

log = logging.getLogger("weft.engine.core")


class EngineCore:
    """A continuous batch over one runner. `now` is a monotonic clock in seconds."""

    def __init__(
        self,
        runner: Runner | ForwardRunner,
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
        self._runner = as_runner(runner)
        self.has_overlap = scheduler.has_overlap = self._runner.has_overlap
        self._executor = Executor(self._runner)
        # The step that the device works on, and the one launched behind it.
        self._current: Step | None = None
        self._next: Step | None = None
        self._collected_at = 0.0
        self._live: dict[Hashable, Sequence] = {}
        self._deadlines = Deadlines()
        self._journal = Journal()

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
            _log_failure(sequence, failure)
            raise failure from error
        self._live[sequence.key] = sequence
        self._deadlines.add(sequence)
        self._journal.begin(sequence)
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
            self._deadlines.add(sequence)
        self.scheduler.reorder()

    def set_paused(self, key: Hashable, is_paused: bool) -> None:
        """Stop, or go on, scheduling a sequence. A token in flight still comes."""
        sequence = self._live.get(key)
        if sequence is not None:
            self._journal.num_paused += is_paused - sequence.is_paused
            self.scheduler.set_paused(sequence, is_paused, self.now())
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
        """Whether a step could do anything now: something in flight or runnable, or an event to report."""
        is_in_flight = self._current is not None or self._next is not None
        return is_in_flight or self._journal.has_news or self.scheduler.has_runnable()

    # -- the step ------------------------------------------------------------

    def step(self) -> StepReport:
        """Launch the next step; collect the one before it, or, without overlap, that same one; report.

        Raises DeviceFault when the device is beyond repair; any other failure ends one sequence.
        """
        self.launch()
        self.collect()
        return self.report()

    def launch(self) -> bool:
        """Schedule a step and start it.

        True: the device is at work, so this is the time to tell what is known, before `collect` waits.
        """
        now = self.now()
        if self.step_started_at is None:
            self.step_bound_s = self.costs.step_bound_s(0)
            self.step_started_at = now
        # Nothing can be built on a step that failed before its sequences have run again.
        if self._live and (self._current is None or self._current.error is None):
            self._end_late(now)
            step = self._launch(self.scheduler.schedule(now), now)
            if self.has_overlap:
                self._next = step
            else:
                self._current = step
        return self.has_overlap and (self._current is not None or self._next is not None)

    def _launch(self, batch: Batch, now: float) -> Step | None:
        if not batch.chunks:
            return None
        num_before = 0 if self._current is None else self._current.batch.num_tokens
        self.step_bound_s = self.costs.step_bound_s(num_before + batch.num_tokens)
        step: Step | None = None
        try:
            for chunk, failure in self._executor.prepare(batch):
                self._fail(chunk.sequence, failure)
            if batch.chunks:
                step = self._executor.launch(batch, now)
        finally:
            if step is None:
                self._finish_copies(batch)
        return step

    def collect(self) -> None:
        """Wait for the step that runs, if any, and take what it brought; then the one behind it runs."""
        step, self._current = self._current, None
        if step is not None:
            try:
                outputs = self._executor.collect(step, self._next)
            finally:
                self._finish_copies(step.batch)
            self._take(step, outputs)
        self._current, self._next = self._next, None
        if self._current is None:
            self.step_started_at = None
        elif step is not None:
            self.step_started_at = self._collected_at

    def settle(self) -> None:
        """Collect all that is in flight."""
        while self._current is not None or self._next is not None:
            self.collect()

    def abandon(self) -> None:
        """Forget what is in flight: it will never be collected."""
        for step in (self._current, self._next):
            if step is not None:
                self._finish_copies(step.batch)
        self._current = self._next = self.step_started_at = None

    def report(self) -> StepReport:
        """The state now, with the tokens and ends that no report has told yet."""
        return self._journal.report(self.scheduler, self.blocks)

    def check_integrity(self) -> None:
        """Recount blocks and sequences. Raises IntegrityError."""
        self.blocks.check_integrity(self._live.values())
        self.scheduler.check_integrity(self._live.values())
        if self._journal.num_paused != sum(sequence.is_paused for sequence in self._live.values()):
            raise IntegrityError("the paused sequences are counted wrong")

    def _finish_copies(self, batch: Batch) -> None:
        """The copies of a batch have run, or will not run: their sources may go."""
        for copy in batch.copies:
            self.blocks.finish_copy(copy)

    # -- update ------------------------------------------------------------

    def _take(self, step: Step, outputs: Iterable[Output]) -> None:
        """Learn from the time that a step took, and take in its outputs."""
        now = self.now()
        num_tokens, num_sequences = step.batch.num_tokens, len(step.batch.chunks)
        self.costs.observe(num_tokens, num_sequences, now - max(step.started_at, self._collected_at))
        self._collected_at = now
        self._journal.step(num_tokens, num_sequences)
        self._update(step.batch, outputs, now)

    def _update(self, batch: Batch, outputs: Iterable[Output], now: float) -> None:
        """Commit what was computed, hand out the tokens, end what is done."""
        last, others = take_decodes(batch.chunks, outputs, self._journal.tokens, now)
        for sequence, reason in last:
            self._finish(sequence, reason)
        for chunk, output in others:
            self._take_output(chunk, output, now)

    def _take_output(self, chunk: Chunk, output: Output, now: float) -> None:
        """The same for one row of any kind."""
        sequence = chunk.sequence
        if sequence.status is SequenceStatus.FINISHED:
            return  # It ended while the step ran. What was computed in excess is nobody's.
        reason = None
        try:
            if isinstance(output, Exception):
                raise output
            if sequence.status is SequenceStatus.RUNNING:
                sequence.num_computed_tokens = chunk.start + chunk.length
                if chunk.length > 1:
                    self.blocks.record(sequence)
            else:
                # It lost its blocks while the step ran. If it drew no token then, none is on its way now.
                sequence.num_foreseen_tokens = len(sequence.token_ids)
            if output is not None:
                self._journal.token(sequence, output, now)
                reason = sequence.append(output.token_id)
        except Exception as error:
            self._fail(sequence, error, "sample" if error is output else "emit")
            return
        if reason is not None:
            self._finish(sequence, reason)

    # -- the ends ------------------------------------------------------------

    def _end_late(self, now: float) -> None:
        """End what is past its deadline, or so near that its last message would come too late."""
        for sequence in self._deadlines.late(now):
            error = (
                None
                if sequence.num_output_tokens
                else DeadlineUnmet("the deadline passed before the first token")
            )
            self._finish(sequence, FinishReason.DEADLINE, error)

    def _fail(self, sequence: Sequence, error: Exception, stage: str = "") -> None:
        failure = error if isinstance(error, RequestError) else InternalFailure(stage, error)
        _log_failure(sequence, failure)
        self._finish(sequence, FinishReason.ERROR, failure)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: RequestError | None = None) -> None:
        """The one way out: blocks released, runner told, the end counted and reported, whatever fails on the
        way.
        """
        try:
            self.scheduler.remove(sequence, is_sound=not isinstance(error, InternalFailure))
            self._runner.forget(sequence)
        finally:
            del self._live[sequence.key]
            self._deadlines.discard(sequence)
            sequence.finish_reason = reason
            self._journal.end(sequence, error, self.now())


def _log_failure(sequence: Sequence, failure: RequestError) -> None:
    extra = {"key": repr(sequence.key)}
    cause: BaseException = failure
    if isinstance(failure, InternalFailure):
        extra["error_id"], cause = failure.error_id, failure.cause
    log.error("sequence failed: %s", failure, exc_info=cause, extra=extra)
