"""The engine's one thread: commands in, events out.

Callers on any thread put commands into an inbox; the thread runs the core and hands each link its events.
Knows links and slots; knows no transport, no protobuf, no tensors.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import NamedTuple

from services.engine.core.engine_core import EngineCore
from services.engine.core.errors import DeviceFault, RequestError
from services.engine.core.events import StepReport
from services.engine.core.sequence import FinishReason, Sequence
from services.engine.deliveries import Deliver, Deliveries, LinkEvents

log = logging.getLogger("weft.engine.loop")

IDLE_POLL_S = 0.02
"""How often a loop with nothing runnable looks at deadlines, while anything is live."""

__all__ = ["GC_THRESHOLDS", "EngineLoop", "EngineUnavailable", "Heartbeat", "LinkEvents"]

GC_THRESHOLDS = (10_000, 20, 50)
"""For `gc.set_threshold` in a process with a loop. A step makes one object per sequence that lives for two
steps; collecting after every 700 of them, as by default, looks through the long-lived ones far too often. The
first number bounds a pause: a young collection looks through so many objects.
"""


class Heartbeat(NamedTuple):
    """The newest step begun, how long it has been running (0 between steps) and how long it may run; and how
    busy the engine is: sequences, tokens to compute before they draw, the pace of that (0 while nothing is
    known), and blocks that are free or hold nothing but cached tokens.
    """

    step: int
    step_elapsed_s: float
    step_bound_s: float
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    tokens_per_second: float = 0.0
    num_free_blocks: int = 0


class EngineUnavailable(RequestError):
    """The engine has failed; whatever was live ends with this."""


class EngineLoop:
    """Owns the core from `start` to `stop`. `on_fault` is called once, on the engine's thread, if it dies."""

    def __init__(
        self,
        core: EngineCore,
        *,
        on_fault: Callable[[BaseException], None],
        observe: Callable[[StepReport], None] | None = None,
    ) -> None:
        self.now = core.now
        self._core = core
        self._on_fault = on_fault
        self._observe = observe
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._deliveries = Deliveries()
        self._link_ids = itertools.count(1)
        self._report = core.report()
        self._drain_at: float | None = None
        self._is_idle = True
        self._is_stopped = threading.Event()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="engine-loop", daemon=True)

    # -- any thread ------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End what is live as cancelled, then the thread."""
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def open_link(self, deliver: Deliver) -> int:
        """A new link. `deliver` is called on the engine's thread and must not block."""
        link_id = next(self._link_ids)
        self._inbox.put(lambda: self._deliveries.open(link_id, deliver))
        return link_id

    def close_link(self, link_id: int) -> None:
        """Cancel everything of a link; nothing more is delivered to it."""

        def command() -> None:
            for slot in self._deliveries.close(link_id):
                self._core.cancel((link_id, slot))

        self._inbox.put(command)

    def submit(self, link_id: int, slot: int, sequence: Sequence) -> None:
        """Admit a sequence; answered by `accepted` or `rejected`. Its key becomes (link_id, slot)."""
        sequence.key = (link_id, slot)
        sequence.arrival = self.now()
        self._inbox.put(lambda: self._submit(link_id, slot, sequence))

    def cancel(self, link_id: int, slot: int) -> None:
        """End a slot; answered by one `finished` unless it had ended."""
        self._inbox.put(lambda: self._core.cancel((link_id, slot)))

    def update(
        self, link_id: int, slot: int, *, priority: int | None = None, deadline: float | None = None
    ) -> None:
        """Change a slot's priority or deadline (seconds of `now`)."""
        self._inbox.put(lambda: self._core.update((link_id, slot), priority=priority, deadline=deadline))

    def pause(self, link_id: int, slot: int) -> None:
        """Stop scheduling a slot."""
        self._inbox.put(lambda: self._core.set_paused((link_id, slot), True))

    def resume(self, link_id: int, slot: int) -> None:
        """Schedule a slot again."""
        self._inbox.put(lambda: self._core.set_paused((link_id, slot), False))

    def drain(self, deadline_s: float) -> None:
        """Admit nothing more; after `deadline_s` seconds cancel what is left. `num_live` tells the rest."""
        at = self.now() + deadline_s

        def command() -> None:
            self._core.is_draining = True
            self._drain_at = at

        self._inbox.put(command)

    def load(self) -> StepReport:
        """The newest snapshot; its tokens and ends are not meant for the caller."""
        return self._report

    @property
    def is_draining(self) -> bool:
        """Whether nothing new is admitted."""
        return self._core.is_draining

    @property
    def num_live(self) -> int:
        """Sequences admitted and not ended, as of the newest snapshot."""
        return self._report.counters.begun - self._report.counters.ended

    def heartbeat(self) -> Heartbeat:
        """Where the step loop stands."""
        core, report = self._core, self._report
        started = core.step_started_at
        return Heartbeat(
            step=report.step + (started is not None),
            step_elapsed_s=0.0 if started is None else max(0.0, self.now() - started),
            step_bound_s=core.step_bound_s,
            num_running=report.num_running,
            num_waiting=report.num_waiting,
            num_waiting_tokens=core.scheduler.num_tokens_to_prefill(),
            tokens_per_second=core.costs.tokens_per_second(),
            num_free_blocks=report.blocks.free + report.blocks.cached,
        )

    # -- the engine's thread ------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._take_commands():
                self._turn()
            self._core.abort_all(FinishReason.CANCELLED)
            self._core.settle()
            self._publish(self._core.report())
        except BaseException as error:
            log.critical("the engine loop died", exc_info=error)
            self._die(error)
        finally:
            self._is_stopped.set()

    def _turn(self) -> None:
        """Launch a step if anything can run, and collect one.

        Over a runner that can overlap, the events of the step collected last go out while the one launched
        now is on the device.
        """
        if self._drain_at is not None and self.now() >= self._drain_at and self._core.num_live:
            self._core.abort_all(FinishReason.CANCELLED)
        is_at_work = self._core.launch()
        if is_at_work:
            self._publish(self._core.report())
        self._core.collect()
        if not is_at_work:
            self._publish(self._core.report())
        # What cannot be placed now is tried again after a while, or a command.
        self._is_idle = not (is_at_work or self._report.num_batched_tokens or self._report.finished)

    def _take_commands(self) -> bool:
        """Run the commands in the inbox; with nothing to do, wait for one. False: stop."""
        timeout: float | None = 0.0
        if self._is_idle and not self._deliveries.has_pending:
            timeout = IDLE_POLL_S if self._core.num_live else None
        while True:
            try:
                command = self._inbox.get(block=timeout != 0.0, timeout=timeout or None)
            except Empty:
                return True
            if command is None:
                return False
            command()
            timeout = 0.0

    def _submit(self, link_id: int, slot: int, sequence: Sequence) -> None:
        if not self._deliveries.is_open(link_id):
            return
        try:
            self._core.add(sequence)
        except RequestError as error:
            self._deliveries.reject(link_id, slot, error)
            return
        self._deliveries.accept(link_id, slot)

    def _publish(self, report: StepReport) -> None:
        """Sort a report's events by link and deliver them."""
        self._report = report
        self._deliveries.sort(report)
        for link_id in self._deliveries.send(report.step):
            self.close_link(link_id)
        if self._observe is not None and (report.num_batched_tokens or report.finished):
            self._observe(report)

    def _die(self, error: BaseException) -> None:
        """Tell everyone that their streams are over, then whoever supervises."""
        self._fault = error
        try:
            if not isinstance(error, DeviceFault):
                log.critical("this is a bug, not a device fault")
            self._core.abandon()
            self._core.abort_all(FinishReason.ERROR, EngineUnavailable("the engine failed"))
            self._publish(self._core.report())
        finally:
            self._on_fault(error)
