"""What waits to be sent on one link, under the receiver's credit.

Tokens and ends queue in the order in which they happened; a frame is a head of that queue. Tokens queue in
columns, as they came, and go into a frame by the slice. With credit there is one frame per step; without,
steps pile up and travel as one frame later: nothing is lost and no position changes. The pile is bounded.
Knows no stream and no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import grpc

from services.engine.core.events import Tokens
from services.engine.loop import Heartbeat, LinkEvents
from services.engine.rpc import convert
from services.engine.rpc.errors import status_error
from weft.rpc.errors import StatusError, failure_from
from weft.v1 import engine_service_pb2 as pb

MAX_PENDING_BYTES = 8 << 20
MAX_PENDING_REPLIES = 100_000
# Far below the message cap, so that a frame never is what breaks a link.
MAX_FRAME_BYTES = 4 << 20
MAX_CREDIT_BYTES = 1 << 62

# Upper bounds of what one item adds to a frame: three varints of up to 5 bytes; a tag, a length, an index
# and a float for logprobs, and a varint and a float for each alternative; a Finished without its failure
# text. The frame's own fields (epoch, step, tags and lengths of the columns) come once.
_TOKEN_BYTES = 15
_LOGPROBS_BYTES = 32
_ALTERNATIVE_BYTES = 9
_FINISHED_BYTES = 120
_FRAME_BYTES = 48


@dataclass(slots=True)
class _Run:
    """The tokens of one delivery. Those before `start` have been sent."""

    tokens: Tokens
    start: int = 0

    def __len__(self) -> int:
        return len(self.tokens) - self.start

    def num_bytes(self, stop: int) -> int:
        """What the rows up to `stop` count for."""
        num_bytes = _TOKEN_BYTES * (stop - self.start)
        for row, (_, top_logprobs) in self.tokens.logprobs.items():
            if self.start <= row < stop:
                num_bytes += _LOGPROBS_BYTES + _ALTERNATIVE_BYTES * len(top_logprobs)
        return num_bytes

    def stop_within(self, room: int) -> int:
        """The row before which `room` bytes are used up."""
        stop = min(len(self.tokens), self.start + max(0, room // _TOKEN_BYTES))
        if not self.tokens.logprobs:
            return stop
        for row in range(self.start, stop):
            room -= _TOKEN_BYTES
            if row in self.tokens.logprobs:
                room -= _LOGPROBS_BYTES + _ALTERNATIVE_BYTES * len(self.tokens.logprobs[row][1])
            if room < 0:
                return row
        return stop

    def move(self, stop: int, frame: Any) -> None:
        """Put the rows up to `stop` into a frame."""
        tokens, start = self.tokens, self.start
        for row in range(start, stop) if tokens.logprobs else ():
            if row in tokens.logprobs:
                entry = len(frame.slots) + row - start
                convert.add_logprobs(frame.logprobs.add(entry=entry), *tokens.logprobs[row])
        frame.slots.extend(tokens.keys[start:stop])
        frame.token_ids.extend(tokens.token_ids[start:stop])
        frame.positions.extend(tokens.positions[start:stop])
        self.start = stop


class Outbox:
    """The queue of one link. One event loop uses it."""

    def __init__(self, epoch: int, credit_bytes: int) -> None:
        self._epoch = epoch
        self._credit = min(credit_bytes, MAX_CREDIT_BYTES)
        self._replies: deque[pb.ConnectResponse] = deque()
        self._items: deque[_Run | pb.Finished] = deque()
        self._pending_bytes = 0
        self._num_pending = 0
        self._step = 0
        self._heartbeat: pb.ConnectResponse | None = None

    @property
    def credit_bytes(self) -> int:
        """How many bytes of frames may be sent."""
        return self._credit

    @property
    def num_pending(self) -> int:
        """Tokens and ends that wait."""
        return self._num_pending

    def add_credit(self, num_bytes: int) -> None:
        """Let more be sent."""
        self._credit = min(self._credit + num_bytes, MAX_CREDIT_BYTES)

    def add(self, events: LinkEvents) -> None:
        """Queue what happened. Raises StatusError(RESOURCE_EXHAUSTED) when the receiver is too far behind."""
        for slot in events.accepted:
            self.reply(pb.ConnectResponse(accepted=pb.Accepted(epoch=self._epoch, slot=slot)))
        for slot, error in events.rejected:
            self.reject(slot, status_error(error))
        if events.tokens:
            run = _Run(events.tokens)
            self._items.append(run)
            self._count(len(run), run.num_bytes(len(run)))
        for slot, end in events.finished:
            finished = convert.finished(slot, end)
            self._items.append(finished)
            self._count(1, _finished_bytes(finished))
        self._step = max(self._step, events.step)
        self._check_bounds()

    def reject(self, slot: int, error: StatusError) -> None:
        """Queue the refusal of a Submit."""
        rejected = pb.Rejected(epoch=self._epoch, slot=slot, failure=failure_from(error))
        self.reply(pb.ConnectResponse(rejected=rejected))

    def reply(self, message: pb.ConnectResponse) -> None:
        """Queue a message that needs no credit. It goes out before any frame."""
        self._replies.append(message)
        self._check_bounds()

    def beat(self, beat: Heartbeat) -> None:
        """Queue a heartbeat in place of an older one that has not been sent."""
        self._heartbeat = pb.ConnectResponse(
            heartbeat=pb.Heartbeat(
                epoch=self._epoch,
                step=beat.step,
                step_elapsed_ms=int(1000 * beat.step_elapsed_s),
                step_bound_ms=int(1000 * beat.step_bound_s),
                running=beat.num_running,
                waiting=beat.num_waiting,
                waiting_tokens=beat.num_waiting_tokens,
                tokens_per_second=beat.tokens_per_second,
                free_blocks=beat.num_free_blocks,
            )
        )

    def next_message(self) -> pb.ConnectResponse | None:
        """Take the next message: replies, then a heartbeat, then a frame as large as the credit allows."""
        if self._replies:
            return self._replies.popleft()
        if self._heartbeat is not None:
            message, self._heartbeat = self._heartbeat, None
            return message
        return self._next_frame()

    def _next_frame(self) -> pb.ConnectResponse | None:
        if not self._items:
            return None
        message = pb.ConnectResponse()
        frame = message.frame
        room = min(self._credit, MAX_FRAME_BYTES) - _FRAME_BYTES
        while self._items:
            size = self._move_next(frame, room)
            if not size:
                break
            room -= size
        if not (frame.slots or frame.finished):
            return None
        frame.epoch, frame.step = self._epoch, self._step
        self._credit -= frame.ByteSize()
        return message

    def _move_next(self, frame: Any, room: int) -> int:
        """Put as much of the next item into a frame as there is room for; what that counts for, in bytes."""
        item = self._items[0]
        if isinstance(item, _Run):
            stop = item.stop_within(room)
            count, size = stop - item.start, item.num_bytes(stop)
            item.move(stop, frame)
            if not item:
                self._items.popleft()
        else:
            count, size = 1, _finished_bytes(item)
            if size > room:
                return 0
            frame.finished.append(item)
            self._items.popleft()
        self._count(-count, -size)
        return size

    def _count(self, num_items: int, num_bytes: int) -> None:
        self._num_pending += num_items
        self._pending_bytes += num_bytes

    def _check_bounds(self) -> None:
        if self._pending_bytes > MAX_PENDING_BYTES or len(self._replies) > MAX_PENDING_REPLIES:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "the gateway does not read its frames",
                reason="LINK_TOO_SLOW",
            )


def _finished_bytes(message: pb.Finished) -> int:
    return _FINISHED_BYTES + message.failure.ByteSize()
