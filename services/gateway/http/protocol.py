"""HTTP/1.1 connections that end when what was begun does not come: uvicorn waits for ever. Knows no path."""

from __future__ import annotations

import asyncio
import re
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.gateway.http.errors import HttpError, body_of, encode, headers_of
from weft.limits import DEFAULT_LIMITS

HEADERS_S = 10.0
# Of one read: every chunk in it costs microseconds on the event loop, and one of a byte is six bytes long.
READ_BYTES = 32 << 10
# Lines of a chunked body, two a chunk: 8 MiB in chunks of a KiB, with room.
MAX_CHUNK_LINES = 32_768
# Of a body whose request is answered already. Its client may still be writing, and would not see the answer
# if the connection were reset under it.
MAX_DISCARDED_BYTES = 32 << 20
_END_OF_HEADERS = re.compile(rb"\n\r?\n")


class Http11(H11Protocol):
    """uvicorn's protocol with a clock on the headers of every request, the first one included, and with
    bounds on what is read for nothing. `headers_s` is for how long headers may take; a connection beyond
    `max_connections` is answered with 503, headers longer than `max_header_bytes` with 431.
    """

    def __init__(
        self,
        *args: Any,
        headers_s: float = HEADERS_S,
        max_connections: int = DEFAULT_LIMITS.max_connections,
        max_header_bytes: int = DEFAULT_LIMITS.max_header_bytes,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._max_header_bytes = max_header_bytes
        self._headers_s = headers_s
        self._clock: asyncio.TimerHandle | None = None
        self._num_chunk_lines = 0
        self._num_discarded = 0

    def connection_made(self, transport: Any) -> None:
        """A connection without a request is on the clock."""
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        if len(self.connections) > self._max_connections:
            self._refuse(HttpError(503, "there are too many connections", code="too_many_connections"))
            return
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        """Headers that are whole stop the clock; a part of them starts it, and so does the rest of a body
        that nobody waits for: its request is answered already.
        """
        if self.transport.is_closing() or not self._may_go_on(data):
            return
        try:
            super().data_received(data)
        except h11.LocalProtocolError:
            # Bytes that are no HTTP behind a request whose answer has begun: there is no answer left to give.
            self.transport.close()
            return
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            # The rest of a body that nobody waited for is through: idle, as after an answer.
            self._stop_clock()
            self._unset_keepalive_if_required()
            wait = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            self.timeout_keep_alive_task = wait
        elif self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE:
            self._start_clock()
        else:
            self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """The clock ends with the connection."""
        self._stop_clock()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The answer to bytes that are no request, in the body that clients expect. Called while the parser's
        exception is handled, which knows the status better.
        """
        hint = getattr(sys.exc_info()[1], "error_status_hint", 400)
        self._refuse(HttpError(hint, msg, code="invalid_http"))

    def _may_go_on(self, data: bytes) -> bool:
        """Count what headers and a body cost, and end the connection when it is too much."""
        if self.conn.their_state is not h11.SEND_BODY:
            self._num_chunk_lines = self._num_discarded = 0
            return self.conn.their_state is not h11.IDLE or self._fits(data)
        if self.conn.our_state is h11.DONE:
            self._num_discarded += len(data)
            if self._num_discarded > MAX_DISCARDED_BYTES:
                self.transport.close()
                return False
        if any(name == b"transfer-encoding" for name, _ in self.headers):
            self._num_chunk_lines += data.count(b"\r\n")
            if self._num_chunk_lines > MAX_CHUNK_LINES:
                self._refuse(HttpError(413, "the body comes in too many chunks", code="too_many_chunks"))
                return False
        return True

    def _fits(self, data: bytes) -> bool:
        """Whether the headers that `data` goes on with are short enough. The parser's own bound counts only
        what it keeps between two reads.
        """
        head = self.conn.trailing_data[0] + data
        end = _END_OF_HEADERS.search(head)
        if (len(head) if end is None else end.end()) <= self._max_header_bytes:
            return True
        self._refuse(HttpError(431, "the headers are too long", code="headers_too_long"))
        return False

    def _refuse(self, error: HttpError) -> None:
        """Answer and close, or only close when an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = encode(body_of(error))
            headers = [
                *headers_of(error),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            reason = HTTPStatus(error.status).phrase.encode()
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            # Whoever reads the body, or was about to answer, is told that there is nobody any more.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = asyncio.get_running_loop().call_later(self._headers_s, self._give_up)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
