"""A request in flight: its samples between the engine's tokens and the client's reading.

Tokens are taken in as frames come, at the engine's pace; updates are given out at the client's. Between the
two the text is coalesced, and a client that falls behind pauses its own slots and nobody else's. Knows
neither gRPC nor HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import grpc

from services.gateway.request import ResolvedRequest, SampleEnd, SampleUpdate
from services.gateway.route import Route
from services.gateway.sample_output import SampleOutput
from weft import logs
from weft.rpc.errors import StatusError, error_from_failure, internal_error, new_error_id
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb

# A slot is paused when this many of its tokens wait for the client, and goes on below half of it.
MAX_PENDING_TOKENS = 256
log = logs.get_logger("gateway")
_DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


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
    """One sample of a request. `link` and `slot` are set while an engine works on it."""

    def __init__(self, request: LiveRequest, index: int) -> None:
        resolved = request.resolved
        self.request = request
        self.index = index
        self.output = SampleOutput(
            resolved.assets.vocabulary,
            stops=resolved.stops,
            min_tokens=resolved.sampling.min_tokens,
            terminal_ids=resolved.terminal_ids,
            skip_special_tokens=resolved.skip_special_tokens,
        )
        self.token_ids: list[int] = []
        self.link: Link | None = None
        self.slot = -1
        self.route = Route()
        self.is_accepted = False
        self.is_cancelled = False
        self.paused_at: float | None = None
        self.end: SampleEnd | None = None
        self._is_end_given = False
        self._logprobs: list[engine_pb.EntryLogprobs] = []

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
        )

    def on_accepted(self) -> None:
        """The engine has queued or started the sample."""
        self.is_accepted = True
        self.route.lost_at = None
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
        self.is_accepted = True
        if not self.request.has_tokens:
            self.request.has_tokens = True
            self.request.on_first_token()
        self.token_ids.append(token_id)
        output = self.output
        is_stopped = output.push(token_id)
        if logprobs is not None and output.num_discarded == 0:
            self._logprobs.append(logprobs)
        if self.link is not None:
            if is_stopped:
                if not self.is_cancelled:
                    self.is_cancelled = True
                    self.link.cancel(self)
            elif output.num_pending >= MAX_PENDING_TOKENS and self.paused_at is None:
                self.paused_at = self.request.now()
                self.link.pause(self)
        self.request.wake()

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

    def take(self) -> SampleUpdate | None:
        """What is new since the last call, or None. Taking lets a paused sample go on."""
        if self._is_end_given:
            return None
        is_ended = self.end is not None
        if not is_ended and not self.output.num_pending:
            return None
        text, token_ids = self.output.finish() if is_ended else self.output.take()
        logprobs, self._logprobs = self._logprobs, []
        self._is_end_given = is_ended
        if self.paused_at is not None:
            self.paused_at = None
            if self.link is not None:
                self.link.resume(self)
        return SampleUpdate(self.index, text, token_ids, logprobs, self.output.num_bytes, self.end)

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
        self.request.wake()


class LiveRequest:
    """All samples of one request. One consumer calls `admitted`, then `next_updates` until None."""

    def __init__(
        self,
        resolved: ResolvedRequest,
        now: Callable[[], float],
        on_first_token: Callable[[], None] = lambda: None,
    ) -> None:
        self.resolved = resolved
        self.now = now
        self.on_first_token = on_first_token
        self.samples = [LiveSample(self, index) for index in range(resolved.num_samples)]
        self.failure: StatusError | None = None
        self.is_closed = False
        self.has_tokens = False
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Something is new for the consumer."""
        self._wake.set()

    def fail(self, error: StatusError) -> None:
        """End the request with `error`, once what its samples have so far is delivered. The first error
        stays.
        """
        if self.failure is None and not self.is_closed:
            self.failure = error
            self._detach()
            self.wake()

    def cancel(self) -> None:
        """End every sample on the client's wish, with FINISH_REASON_CANCELLED."""
        for sample in self.samples:
            sample.cancel()

    def close(self) -> None:
        """The consumer is gone or done. What still runs is cancelled. May come twice."""
        self.is_closed = True
        self._detach()

    async def admitted(self) -> None:
        """Return when the engine has taken every sample. Raises StatusError."""
        while not all(sample.is_accepted or sample.end is not None for sample in self.samples):
            if self.failure is not None:
                raise self.failure
            self._wake.clear()
            await self._wake.wait()
        self.wake()

    async def next_updates(self) -> list[SampleUpdate] | None:
        """Wait for news: at most one update a sample, everything that came meanwhile in it. None when every
        sample has ended. Raises StatusError when the request failed.
        """
        while True:
            updates = [update for sample in self.samples if (update := sample.take()) is not None]
            if updates:
                return updates
            if self.failure is not None:
                raise self.failure
            if all(sample.is_done for sample in self.samples):
                return None
            self._wake.clear()
            await self._wake.wait()

    def _detach(self) -> None:
        for sample in self.samples:
            sample.detach()
