"""What waits to be sent on one link, under the receiver's credit.

Tokens and ends queue in the order in which they happened; a frame is a head of that queue. With credit
there is one frame per step; without, steps pile up and travel as one frame later: nothing is lost and no
position changes. The pile is bounded. Knows no stream and no clock.
"""

from __future__ import annotations

from collections import deque

import grpc

from services.engine.core.events import FinishedEvent, TokenEvent
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


def _token_bytes(token: TokenEvent) -> int:
    if token.logprob is None:
        return _TOKEN_BYTES
    return _TOKEN_BYTES + _LOGPROBS_BYTES + _ALTERNATIVE_BYTES * len(token.top_logprobs)


class Outbox:
    """The queue of one link. One event loop uses it."""

    def __init__(self, epoch: int, credit_bytes: int) -> None:
        self._epoch = epoch
        self._credit = min(credit_bytes, MAX_CREDIT_BYTES)
        self._replies: deque[pb.ConnectResponse] = deque()
        self._items: deque[tuple[int, TokenEvent | pb.Finished, int]] = deque()
        self._pending_bytes = 0
        self._step = 0
        self._heartbeat: pb.ConnectResponse | None = None

    @property
    def credit_bytes(self) -> int:
        """How many bytes of frames may be sent."""
        return self._credit

    @property
    def num_pending(self) -> int:
        """Tokens and ends that wait."""
        return len(self._items)

    def add_credit(self, num_bytes: int) -> None:
        """Let more be sent."""
        self._credit = min(self._credit + num_bytes, MAX_CREDIT_BYTES)

    def add(self, events: LinkEvents) -> None:
        """Queue what happened. Raises StatusError(RESOURCE_EXHAUSTED) when the receiver is too far behind."""
        for slot in events.accepted:
            self.reply(pb.ConnectResponse(accepted=pb.Accepted(epoch=self._epoch, slot=slot)))
        for slot, error in events.rejected:
            self.reject(slot, status_error(error))
        for slot, token in events.tokens:
            self._push(slot, token, _token_bytes(token))
        for slot, end in events.finished:
            self._push_finished(slot, end)
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
        room = min(self._credit, MAX_FRAME_BYTES) - _FRAME_BYTES
        if not self._items or self._items[0][2] > room:
            return None
        message = pb.ConnectResponse()
        frame = message.frame
        frame.epoch, frame.step = self._epoch, self._step
        slots: list[int] = []
        token_ids: list[int] = []
        positions: list[int] = []
        items = self._items
        while items and items[0][2] <= room:
            slot, item, size = items.popleft()
            room -= size
            self._pending_bytes -= size
            if isinstance(item, pb.Finished):
                frame.finished.append(item)
                continue
            if item.logprob is not None:
                convert.add_logprobs(frame.logprobs.add(entry=len(slots)), item)
            slots.append(slot)
            token_ids.append(item.token_id)
            positions.append(item.position)
        frame.slots.extend(slots)
        frame.token_ids.extend(token_ids)
        frame.positions.extend(positions)
        self._credit -= frame.ByteSize()
        return message

    def _push(self, slot: int, item: TokenEvent | pb.Finished, size: int) -> None:
        self._items.append((slot, item, size))
        self._pending_bytes += size

    def _push_finished(self, slot: int, end: FinishedEvent) -> None:
        message = convert.finished(slot, end)
        self._push(slot, message, _FINISHED_BYTES + message.failure.ByteSize())

    def _check_bounds(self) -> None:
        if self._pending_bytes > MAX_PENDING_BYTES or len(self._replies) > MAX_PENDING_REPLIES:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "the gateway does not read its frames",
                reason="LINK_TOO_SLOW",
            )
