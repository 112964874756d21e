"""Many samples in one link: slots given out, commands put in, columns of a frame handed to whom they belong.

One Multiplexer lives as long as one epoch. It drops, and counts, what has the wrong epoch, slot or position.
Knows the messages of a link but not how they travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import grpc

from services.gateway.links.terms import LinkLost
from services.gateway.streams.live import LiveSample
from weft import logs
from weft.rpc.errors import internal_error, new_error_id
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import generation_pb2 as pb

# The engine has no place, or takes nothing more: that is not the request's fault.
_REFUSALS = frozenset(
    code.value[0] for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
)
_INTERNAL = grpc.StatusCode.INTERNAL.value[0]
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
log = logs.get_logger("gateway.link")


class ProtocolViolation(Exception):
    """The engine sent what it must not send; the link is given up."""


@dataclass(slots=True)
class LinkCounters:
    """What happened on the links to one engine since the start."""

    sessions: int = 0
    frames: int = 0
    tokens: int = 0
    dropped_epoch: int = 0
    dropped_slot: int = 0
    dropped_position: int = 0
    late_tokens: int = 0
    holes: int = 0
    pauses: int = 0
    lost_samples: int = 0
    moved_samples: int = 0

    def items(self) -> list[tuple[str, int]]:
        """Names and values, for metrics."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


class SlotOwner(Protocol):
    """Who is told what becomes of slots: the link."""

    def on_slot_lost(self, sample: LiveSample) -> None:
        """The sample's tokens can no longer follow in its slot."""

    def on_slot_refused(self, sample: LiveSample, failure: pb.Failure) -> None:
        """The engine has no room for the sample, or admits nothing more."""

    def on_slot_free(self) -> None:
        """A slot came free."""

    def on_slot_failed(self, request_id: str) -> None:
        """The engine failed a sample of this request by a fault of its own."""

    def on_slot_worked(self) -> None:
        """The engine brought a sample to its end."""


class Multiplexer:
    """The slots of one epoch. `send` queues a command and never blocks."""

    def __init__(
        self,
        epoch: int,
        *,
        send: Callable[[engine_pb.ConnectRequest], None],
        owner: SlotOwner,
        now: Callable[[], float],
        counters: LinkCounters,
        credit_bytes: int,
    ) -> None:
        self.epoch = epoch
        self._send = send
        self._owner = owner
        self._now = now
        self._counters = counters
        self._credit_bytes = credit_bytes
        self._unreturned_bytes = 0
        # None: the sample is gone, but its slot is not free before the engine has said so.
        self._slots: dict[int, LiveSample | None] = {}
        self._free: deque[int] = deque()
        self._next_slot = 0

    @property
    def num_live(self) -> int:
        """Slots that the engine works on, as far as this side knows."""
        return len(self._slots)

    def submit(self, sample: LiveSample) -> None:
        """Give the sample a slot and send it. The deadline must not have passed."""
        slot = self._free.popleft() if self._free else self._new_slot()
        deadline = sample.request.resolved.deadline
        budget_ms = None if deadline is None else max(1, int((deadline - self._now()) * 1000))
        self._slots[slot] = sample
        sample.slot = slot
        sample.paused_at = None
        self._send(engine_pb.ConnectRequest(submit=sample.submit(slot, budget_ms)))

    def cancel(self, sample: LiveSample) -> None:
        """Ask for the end of the sample's slot."""
        self._send(engine_pb.ConnectRequest(cancel=engine_pb.Cancel(slot=sample.slot)))

    def pause(self, sample: LiveSample) -> None:
        """Stop the sample's slot."""
        self._counters.pauses += 1
        self._send(engine_pb.ConnectRequest(pause=engine_pb.Pause(slot=sample.slot)))

    def resume(self, sample: LiveSample) -> None:
        """Let the sample's slot go on."""
        self._send(engine_pb.ConnectRequest(resume=engine_pb.Resume(slot=sample.slot)))

    def detach(self, sample: LiveSample) -> None:
        """Forget the sample and cancel its slot."""
        if self._slots.get(sample.slot) is sample:
            self._slots[sample.slot] = None
            self.cancel(sample)

    def samples(self) -> list[LiveSample]:
        """The samples that have a slot."""
        return [sample for sample in self._slots.values() if sample is not None]

    def drop_all(self) -> list[LiveSample]:
        """The link is gone: empty the table and return the samples that were on it."""
        samples = self.samples()
        self._slots.clear()
        self._counters.lost_samples += len(samples)
        return samples

    def on_accepted(self, accepted: engine_pb.Accepted) -> None:
        """A Submit was admitted."""
        if self._is_ours(accepted.epoch) and (sample := self._slots.get(accepted.slot)) is not None:
            sample.on_accepted()

    def on_rejected(self, rejected: engine_pb.Rejected) -> None:
        """A Submit was refused; its slot is free."""
        if not self._is_ours(rejected.epoch):
            return
        if rejected.slot not in self._slots:
            self._counters.dropped_slot += 1
            return
        is_refused = rejected.failure.code in _REFUSALS
        # What an engine had no room for leaves no room behind.
        sample = self._release(rejected.slot, is_room=not is_refused)
        if sample is None:
            return
        if is_refused:
            sample.link = None
            self._owner.on_slot_refused(sample, rejected.failure)
        else:
            if rejected.failure.code == _INTERNAL:
                self._owner.on_slot_failed(sample.request.resolved.request_id)
            sample.on_rejected(rejected.failure)

    def on_frame(self, frame: engine_pb.StepFrame) -> None:
        """Hand every token, then every end, to its sample; return credit once enough has come together.
        Raises LinkLost when the engine says that it has failed: then nothing more comes of any slot.
        """
        self._return_credit(frame.ByteSize())
        if not self._is_ours(frame.epoch):
            return
        token_ids, positions = frame.token_ids, frame.positions
        if not len(frame.slots) == len(token_ids) == len(positions):
            raise ProtocolViolation("a frame's columns have different lengths")
        counters = self._counters
        counters.frames += 1
        counters.tokens += len(token_ids)
        slots = self._slots
        find = slots.get
        logprobs = {entry.entry: entry for entry in frame.logprobs} if frame.logprobs else None
        entry = -1
        for slot, token_id, position in zip(frame.slots, token_ids, positions, strict=True):
            entry += 1
            sample = find(slot)
            if sample is None:
                if slot in slots:
                    counters.late_tokens += 1
                else:
                    counters.dropped_slot += 1
            elif position == len(sample.token_ids):
                try:
                    sample.on_token(token_id, logprobs.get(entry) if logprobs else None)
                except Exception as error:  # one request's text must not end the others' link
                    self._fail(sample, error)
            else:
                counters.dropped_position += 1
                if position > len(sample.token_ids):
                    self._lose(sample)
        failure: pb.Failure | None = None
        for finished in frame.finished:
            if finished.failure.code == _UNAVAILABLE:
                failure = finished.failure  # the sample keeps its slot, and is lost with the link
            else:
                self._on_finished(finished)
        if failure is not None:
            raise LinkLost(f"failed: {failure.message}")

    def _on_finished(self, finished: engine_pb.Finished) -> None:
        if finished.slot not in self._slots:
            self._counters.dropped_slot += 1
            return
        sample = self._release(finished.slot)
        if sample is None:
            return
        has_hole = finished.usage.completion_tokens > len(sample.token_ids)
        self._counters.holes += has_hole and not sample.is_cancelled
        # Cancelled without our asking: the end of the engine's drain.
        is_cut = has_hole or finished.reason == pb.FINISH_REASON_CANCELLED
        if is_cut and not sample.is_cancelled:
            sample.link = None
            self._owner.on_slot_lost(sample)
            return
        if finished.failure.code == _INTERNAL:
            self._owner.on_slot_failed(sample.request.resolved.request_id)
        elif not finished.failure.code:
            self._owner.on_slot_worked()
        sample.on_finished(finished)

    @staticmethod
    def _fail(sample: LiveSample, error: Exception) -> None:
        error_id = new_error_id()
        log.failure("a token could not be taken in", error, error_id=error_id)
        sample.request.fail(internal_error(error_id))

    def _lose(self, sample: LiveSample) -> None:
        """A token is missing: whatever comes now cannot be placed. Give the slot up, keep the sample."""
        self._counters.holes += 1
        self.detach(sample)
        sample.link = None
        self._owner.on_slot_lost(sample)

    def _is_ours(self, epoch: int) -> bool:
        if epoch != self.epoch:
            self._counters.dropped_epoch += 1
            return False
        return True

    def _release(self, slot: int, *, is_room: bool = True) -> LiveSample | None:
        sample = self._slots.pop(slot)
        self._free.append(slot)
        if is_room:
            self._owner.on_slot_free()
        return sample

    def _new_slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1

    def _return_credit(self, num_bytes: int) -> None:
        self._unreturned_bytes += num_bytes
        if self._unreturned_bytes >= self._credit_bytes // 4:
            self._send(engine_pb.ConnectRequest(credit=engine_pb.FrameCredit(bytes=self._unreturned_bytes)))
            self._unreturned_bytes = 0
