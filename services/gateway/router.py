"""Which engine a sample goes to, and what becomes of a sample whose engine is lost.

Least loaded first. A lost sample keeps its prompt, its seed and every token it was given, so another engine
of the same artifact, or the same one after a restart, can go on where it stopped. Knows nothing of clients.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence

import grpc

from services.gateway.engine_client import EngineLink, LinkLost
from services.gateway.live import LiveSample
from weft.rpc.errors import StatusError

RETRY_S = 1.0
# How often a sample that lost its engine asks one whose queue is full.
MIN_BUSY_S = 0.05
MAX_BUSY_S = 1.0


class Router:
    """The links of this gateway. `max_placements` bounds how often one sample may be started, so that a
    request that kills engines does not kill them all; `wait_s` is how long a lost sample waits for an engine.
    """

    def __init__(
        self, *, wait_s: float, max_placements: int = 4, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.links: Sequence[EngineLink] = ()
        self.num_replays = 0
        self._wait_s = wait_s
        self._max_placements = max_placements
        self._on_change = on_change
        self._waiting: dict[LiveSample, asyncio.TimerHandle] = {}
        self._changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether at least one engine takes requests."""
        return any(True for _ in self.usable())

    def usable(self) -> Iterable[EngineLink]:
        """Links that take new samples."""
        return (link for link in self.links if link.is_up and not link.is_draining)

    def by_model(self) -> dict[str, EngineLink]:
        """Every model that can be used now, with the least loaded link to it."""
        found: dict[str, EngineLink] = {}
        for link in sorted(self.usable(), key=lambda link: link.num_live):
            if link.info is not None:
                found.setdefault(link.info.model_name, link)
        return found

    def find(self, model: str) -> EngineLink:
        """The link for a model's name; empty takes the only model there is. Raises StatusError."""
        models = self.by_model()
        if not models:
            raise self.unavailable()
        if not model:
            if len(models) > 1:
                raise StatusError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "model: there are several, one must be named",
                    field_violations=[("model", "there are several, one must be named")],
                )
            return next(iter(models.values()))
        link = models.get(model)
        if link is None:
            if any(other.info and other.info.model_name == model for other in self.links):
                raise self.unavailable()
            raise StatusError(
                grpc.StatusCode.NOT_FOUND,
                f"model {model[:80]!r} is not served here",
                reason="MODEL_NOT_FOUND",
            )
        return link

    async def find_soon(self, model: str, deadline: float | None) -> EngineLink:
        """`find`, but a model whose engine was lost a moment ago gets `wait_s` from then to come back: a new
        request is worth as much as one that was running. Never past `deadline`. Raises StatusError.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                return self.find(model)
            except StatusError as error:
                until = self._awaited_until(model)
                until = until if deadline is None else min(until, deadline)
                if error.code is not grpc.StatusCode.UNAVAILABLE or loop.time() >= until:
                    raise
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._changed.wait()

    def _awaited_until(self, model: str) -> float:
        """Until when a lost engine of this model may still come back; 0 when none was lost."""
        lost = (
            link.lost_at + self._wait_s
            for link in self.links
            if link.lost_at is not None and not link.is_up and not link.is_draining
            if not model or (link.info is not None and link.info.model_name == model)
        )
        return max(lost, default=0.0)

    @staticmethod
    def unavailable() -> StatusError:
        """No engine can take a request now."""
        return StatusError(
            grpc.StatusCode.UNAVAILABLE, "no engine is ready", retry_after_s=RETRY_S, reason="NO_ENGINE"
        )

    def place(self, sample: LiveSample) -> bool:
        """Send a sample to the least loaded engine of its artifact. False when there is none."""
        wanted = sample.request.resolved.info
        for link in sorted(self.usable(), key=lambda link: link.num_live):
            if link.info is None or link.info.artifact_digest != wanted.artifact_digest:
                continue
            if link.info.model_name != wanted.model_name:
                continue
            try:
                link.submit(sample)
            except LinkLost:
                continue
            return True
        return False

    def on_lost(self, sample: LiveSample) -> None:
        """A sample's link is gone. Go on elsewhere, wait for an engine, or end the request."""
        if not self._is_over(sample) and not self._replay(sample):
            self._wait(sample, self._wait_s)

    def on_busy(self, sample: LiveSample, retry_s: float) -> None:
        """An engine has no place now for a sample that lost its own. It was admitted once, so it tries again
        instead of being refused in the middle of its text.
        """
        sample.route.num_placements -= 1  # it was not started
        if not self._is_over(sample):
            self._wait(sample, min(max(retry_s, MIN_BUSY_S), MAX_BUSY_S))

    def _wait(self, sample: LiveSample, retry_s: float) -> None:
        """Try again after `retry_s`, or when a link comes up; give up after `wait_s` in all."""
        now = sample.request.now()
        if sample.route.lost_at is None:
            sample.route.lost_at = now
        until = sample.route.lost_at + self._wait_s
        deadline = sample.request.resolved.deadline
        if deadline is not None:
            until = min(until, deadline - 0.05)
        then = self._retry if now + retry_s < until else self._give_up
        delay_s = max(0.0, min(retry_s, until - now))
        self._waiting[sample] = asyncio.get_running_loop().call_later(delay_s, then, sample)

    def _retry(self, sample: LiveSample) -> None:
        del self._waiting[sample]
        self.on_lost(sample)

    def on_link_change(self, link: EngineLink) -> None:
        """A link came up, went down or drains."""
        if link.is_up and not link.is_draining:
            for sample in list(self._waiting):
                if self._is_over(sample) or self._replay(sample):
                    self._waiting.pop(sample).cancel()
        self._changed.set()
        self._on_change()

    def _is_over(self, sample: LiveSample) -> bool:
        request = sample.request
        return request.is_closed or request.failure is not None or sample.finish_without_engine()

    def _replay(self, sample: LiveSample) -> bool:
        """Start the sample again after its last token, or end its request if that must not be."""
        request = sample.request
        if self._has_expired(sample):
            sample.finish_at_deadline()
        elif sample.route.num_placements >= self._max_placements:
            request.fail(self._engine_lost("the engine was lost again and again"))
        elif self.place(sample):
            self.num_replays += 1
        else:
            return False
        return True

    def _give_up(self, sample: LiveSample) -> None:
        del self._waiting[sample]
        if self._is_over(sample):
            return
        deadline = sample.request.resolved.deadline
        if deadline is not None and deadline - sample.request.now() < 0.1:
            sample.finish_at_deadline()
        else:
            sample.request.fail(self._engine_lost("the engine was lost and no other took the request"))

    @staticmethod
    def _has_expired(sample: LiveSample) -> bool:
        deadline = sample.request.resolved.deadline
        return deadline is not None and deadline <= sample.request.now()

    @staticmethod
    def _engine_lost(message: str) -> StatusError:
        return StatusError(grpc.StatusCode.UNAVAILABLE, message, retry_after_s=RETRY_S, reason="ENGINE_LOST")
