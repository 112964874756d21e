"""One sample of a request, from the engine's tokens to its reader's updates. Knows neither gRPC nor HTTP."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Protocol

import grpc

from services.gateway.request import SampleEnd, SampleUpdate
from services.gateway.streams.journal import Journal, Replay
from services.gateway.streams.route import Route
from services.gateway.streams.sample_output import SampleOutput
from weft import logs
from weft.rpc.errors import StatusError, error_from_failure, internal_error, new_error_id
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from services.gateway.streams.live import LiveRequest

# A slot is paused when this many of its tokens wait for the client, and goes on when the client takes them.
MAX_PENDING_TOKENS = 256
_DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
log = logs.get_logger("gateway")


class Link(Protocol):
    """What a sample asks of the link that carries it."""

    def cancel(self, sample: LiveSample) -> None:
        """Ask the engine to end the sample; its Finished still comes."""

    def pause(self, sample: LiveSample) -> None:
        """Stop scheduling the sample."""

    def resume(self, sample: LiveSample) -> None:
        """Schedule it again."""

    def detach(self, sample: LiveSample) -> None:
        """Forget the sample; the slot comes free when the engine says so."""


class LiveSample:
    """One sample of a request. `link` and `slot` are set while an engine works on it. With `before`, it goes
    on where that one, which has failed, stopped.
    """

    def __init__(self, request: LiveRequest, index: int, before: LiveSample | None = None) -> None:
        self.request = request
        self.index = index
        self.output = self._new_output()
        self.journal: Journal = (
            Journal(keeps_offsets=request.is_resumable) if before is None else before.journal.copy()
        )
        self.token_ids: array[int] = self.journal.token_ids
        self.link: Link | None = None
        self.slot = -1
        self.route: Route = Route() if before is None else Route(numerics_id=before.route.numerics_id)
        self.is_accepted = False
        self.is_cancelled = False
        self.paused_at: float | None = None
        self.end: SampleEnd | None = None
        self._is_end_given = False
        self._num_taken = 0
        # What a reader that came back has not read again yet.
        self._replay: Replay | None = None
        if before is not None:
            for token_id in self.token_ids:
                self.output.push(token_id)
            self.end, self.is_cancelled = before.end, before.is_cancelled
            self.is_accepted = True

    def _new_output(self) -> SampleOutput:
        resolved = self.request.resolved
        return SampleOutput(
            resolved.assets.vocabulary,
            stops=resolved.stops,
            min_tokens=resolved.sampling.min_tokens,
            terminal_ids=resolved.terminal_ids,
            skip_special_tokens=resolved.skip_special_tokens,
        )

    def submit(self, slot: int, budget_ms: int | None) -> engine_pb.Submit:
        """The message that starts, or goes on with, this sample."""
        resolved = self.request.resolved
        return engine_pb.Submit(
            slot=slot,
            request_id=resolved.request_id,
            prompt_token_ids=resolved.prompt_token_ids,
            emitted_token_ids=self.token_ids,
            sampling=resolved.sampling,
            sample_index=self.index,
            priority=resolved.priority,
            budget_ms=budget_ms,
            must_complete=resolved.must_complete,
            cache_salt=resolved.cache_salt,
            retain_seconds=resolved.retain_seconds,
        )

    def on_accepted(self) -> None:
        """The engine has queued or started the sample."""
        self.is_accepted = True
        self.route.settle()
        self.request.wake()

    def on_rejected(self, failure: pb.Failure) -> None:
        """The engine refused the sample. That ends the request; but a sample with tokens, started again too
        close to its deadline, ends as any other that its deadline met.
        """
        self.link = None
        if failure.code == _DEADLINE_EXCEEDED:
            self.finish_at_deadline(failure)
        else:
            self.request.fail(error_from_failure(failure))

    def on_token(self, token_id: int, logprobs: engine_pb.EntryLogprobs | None) -> None:
        """The next token of the sample, in order."""
        request = self.request
        if not request.has_tokens:
            request.has_tokens = True
            request.on_first_token()
        self.is_accepted = True
        self.token_ids.append(token_id)
        output = self.output
        is_stopped = output.push(token_id)
        if logprobs is not None and output.num_discarded == 0:
            self.journal.add_logprobs(logprobs)
        if self.link is not None:
            if is_stopped:
                if not self.is_cancelled:
                    self.is_cancelled = True
                    self.link.cancel(self)
            elif len(output.pending_ids) >= MAX_PENDING_TOKENS:
                self._hold_back()
        reader = request.reader
        if reader is None:
            return
        if is_stopped or len(self.token_ids) == 1:  # neither an end nor a first token is ever held
            reader.wake()
        else:
            request.pacer.on_tokens(reader)

    def on_finished(self, finished: engine_pb.Finished) -> None:
        """The engine is done with the sample. Its slot is free."""
        self.link = None
        reason = finished.reason
        if self.output.stop is not None:
            self._end(pb.FINISH_REASON_STOP, finished)
        elif finished.HasField("failure") and (reason == pb.FINISH_REASON_ERROR or not self.token_ids):
            self.request.fail(error_from_failure(finished.failure))
        elif reason in (pb.FINISH_REASON_UNSPECIFIED, pb.FINISH_REASON_ERROR):
            error_id = new_error_id()
            log.error("the engine ended a sample unexplained", reason=reason, error_id=error_id)
            self.request.fail(internal_error(error_id))
        else:
            self._end(reason, finished)

    def finish_without_engine(self) -> bool:
        """End the sample if all that was missing is the engine's word: its link is gone. Says whether it has
        ended.
        """
        self.link = None
        if self.end is not None:
            return True
        if self.output.stop is not None:
            self._end(pb.FINISH_REASON_STOP, engine_pb.Finished())
        elif self.is_cancelled:
            self._end(pb.FINISH_REASON_CANCELLED, engine_pb.Finished())
        return self.end is not None

    def finish_at_deadline(self, failure: pb.Failure | None = None) -> None:
        """End the sample because its deadline came while no engine worked on it, or none would."""
        if self.token_ids:
            self._end(pb.FINISH_REASON_DEADLINE, engine_pb.Finished())
        else:
            text = "no token before the deadline" if failure is None else failure.message
            self.request.fail(StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, text))

    def cancel(self) -> None:
        """End the sample on the client's wish; what it has so far is delivered."""
        if self.end is None and not self.is_cancelled:
            self.is_cancelled = True
            if self.link is not None:
                self.link.cancel(self)
            else:
                self.finish_without_engine()

    def detach(self) -> None:
        """Let go of the slot; nothing of the sample is wanted any more."""
        if self.link is not None:
            self.link.detach(self)
            self.link = None

    def _hold_back(self) -> None:
        """Much waits for the reader: pause the slot. What nobody reads now is in the journal."""
        if self.request.reader is None or self._replay is not None:
            self.output.take()
        elif self.paused_at is None and self.link is not None:
            self.paused_at = self.request.now()
            self.link.pause(self)

    def go_on(self) -> None:
        """Let a paused slot go on."""
        if self.paused_at is not None:
            self.paused_at = None
            if self.link is not None:
                self.link.resume(self)

    def rewind(self, num_tokens: int, offset: int) -> None:
        """The next `take` begins at this place of the journal."""
        self.journal.rewind(num_tokens, offset)
        self._replay = Replay(self._new_output(), self.token_ids, num_tokens, offset)
        self._is_end_given = False
        self.go_on()

    def take(self) -> SampleUpdate | None:
        """What is new since the last call, or None. Taking lets a paused sample go on."""
        if self._is_end_given:
            return None
        if self._replay is not None and (update := self._take_again(self._replay)) is not None:
            return update
        output = self.output
        is_ended = self.end is not None
        if not is_ended and not output.pending_ids:
            return None
        text, token_ids = output.finish() if is_ended else output.take()
        start = self._num_taken
        self._num_taken += len(token_ids)
        logprobs = self.journal.logprobs(start, self._num_taken)
        self._is_end_given = is_ended
        if self.paused_at is not None:
            self.go_on()
        return SampleUpdate(self.index, text, token_ids, logprobs, output.num_bytes, self.end)

    def _take_again(self, replay: Replay) -> SampleUpdate | None:
        """The next part of the journal. None at its end: the output itself is at that place then."""
        output, start = self.output, replay.num_tokens
        text, token_ids, offset = replay.take(output.num_tokens, is_ended=self.end is not None)
        end = None
        if replay.num_tokens == output.num_tokens:
            self._replay = None
            output.take()
            self._num_taken = replay.num_tokens
            end = self.end
            self._is_end_given = end is not None
        if not text and not token_ids and end is None:
            return None
        logprobs = self.journal.logprobs(start, replay.num_tokens)
        return SampleUpdate(self.index, text, token_ids, logprobs, offset, end)

    @property
    def is_done(self) -> bool:
        """Whether its end has been given out."""
        return self._is_end_given

    def _end(self, reason: pb.FinishReason, finished: engine_pb.Finished) -> None:
        output = self.output
        receipt = finished.receipt
        drawn = max(finished.usage.completion_tokens, len(self.token_ids))
        receipt.discarded_tokens = max(0, drawn - output.num_tokens)
        usage = pb.Usage(
            prompt_tokens=len(self.request.resolved.prompt_token_ids),
            completion_tokens=output.num_tokens,
            cached_tokens=finished.usage.cached_tokens,
        )
        self.end = SampleEnd(reason, output.stop or "", usage, receipt)
        self.request.on_sample_end()
