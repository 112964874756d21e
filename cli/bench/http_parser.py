"""HTTP/1.1 answers out of bytes, by hand: a load tool reads hundreds of thousands of small chunks, and each
layer of a general client costs more than the chunk itself. Pure.

Knows status line, headers, chunked and counted bodies and bodies that end with the connection. Does not know
compression, trailers' meaning, upgrades or redirects.
"""

from __future__ import annotations

MAX_HEADER_BYTES = 64 << 10
MAX_LINE_BYTES = 8 << 20


class HttpBroken(Exception):
    """Bytes that are no HTTP/1.1 answer."""


class AnswerParser:
    """One answer. `feed` gives the body's bytes as they come; `is_done` says that the answer is whole."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_done = False
        self._buffer = b""
        self._has_head = False
        self._is_chunked = False
        self._left: int | None = None  # of the body or the chunk; None: until the connection ends
        self._in_trailers = False

    @property
    def is_keeping_alive(self) -> bool:
        """Whether the connection can take another request once this answer is whole."""
        is_bounded = self._is_chunked or self._left is not None
        return is_bounded and self.headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes in; the pieces of the body among them. Raises HttpBroken."""
        self._buffer = self._buffer + data if self._buffer else data
        if not self._has_head and not self._read_head():
            return []
        if self.is_done:
            return []
        return self._chunks() if self._is_chunked else self._plain()

    def ended(self) -> None:
        """The connection has ended. Raises HttpBroken when the answer was not whole."""
        if self.is_done:
            return
        if self._has_head and not self._is_chunked and self._left is None:
            self.is_done = True
            return
        raise HttpBroken("the connection ended inside of an answer")

    def _read_head(self) -> bool:
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEADER_BYTES:
                    raise HttpBroken("the headers have no end")
                return False
            head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._parse_head(head.decode("latin-1"))
            if self.status >= 200:  # what comes before are hints
                break
        self._has_head = True
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if self._is_chunked or self.status in (204, 304):
            self._left = 0
        elif "content-length" in self.headers:
            if not self.headers["content-length"].isdigit():
                raise HttpBroken("content-length is no number")
            self._left = int(self.headers["content-length"])
        self.is_done = not self._is_chunked and self._left == 0
        return True

    def _parse_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        parts = first.split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit():
            raise HttpBroken("no HTTP/1.1 answer")
        self.status = int(parts[1])
        self.headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()

    def _plain(self) -> list[bytes]:
        data, self._buffer = self._buffer, b""
        if self._left is not None:
            data, self._buffer = data[: self._left], data[self._left :]
            self._left -= len(data)
            self.is_done = self._left == 0
        return [data] if data else []

    def _chunks(self) -> list[bytes]:
        found: list[bytes] = []
        buffer, at = self._buffer, 0
        while not self.is_done:
            if self._left:  # inside of a chunk; two more bytes end it
                piece = buffer[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                if piece:
                    found.append(piece)
                if self._left:
                    break
                self._left = None
            if self._left is None:
                if len(buffer) - at < 2:
                    break
                if buffer[at : at + 2] != b"\r\n":
                    raise HttpBroken("a chunk does not end where it said")
                at, self._left = at + 2, 0
            end = buffer.find(b"\r\n", at)
            if end < 0:
                if len(buffer) - at > MAX_HEADER_BYTES:
                    raise HttpBroken("a chunk's size has no end")
                break
            line, at = buffer[at:end], end + 2
            if self._in_trailers:
                self.is_done = not line
                continue
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise HttpBroken("a chunk has no size") from None
            if self._left < 0:
                raise HttpBroken("a chunk has no size")
            self._in_trailers = self._left == 0
        self._buffer = buffer[at:]
        return found


class EventParser:
    """Server-sent events: the `data` of each, as they come."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes in; the data of the lines that are whole. Raises HttpBroken for a line without end."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE_BYTES:
            raise HttpBroken("an event has no end")
        # One line is one event for every server of this API.
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
