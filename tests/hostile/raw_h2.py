"""HTTP/2 by hand: frames as they are built, good or bad, and what comes back. Knows no service."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import hpack
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from weft.rpc.address import Address

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW = 2**31 - 1
Pairs = list[tuple[str, str]]


def framed(message: bytes, *, is_compressed: bool = False, length: int | None = None) -> bytes:
    """A gRPC message with its prefix; `length` when the prefix is to lie."""
    size = len(message) if length is None else length
    return bytes([is_compressed]) + size.to_bytes(4, "big") + message


def call_headers(path: str, *more: tuple[str, str], without: str = "") -> Pairs:
    """The headers of a gRPC call."""
    pairs = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    return [*(pair for pair in pairs if pair[0] != without), *more]


class H2:
    """One connection. What the server sends is kept by stream; windows are granted unless told otherwise."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, grants: bool) -> None:
        self.headers: dict[int, dict[str, str]] = {}
        self.data: dict[int, bytearray] = {}
        self.resets: dict[int, int] = {}
        self.goaway: int | None = None
        self.is_closed = False
        self.num_pongs = 0
        self._reader = reader
        self._writer = writer
        self._grants = grants
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._block = b""
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        address: Address,
        *,
        preface: bytes = PREFACE,
        settings: dict[int, int] | None = None,
        grants: bool = True,
        limit: int = 1 << 16,
    ) -> H2:
        reader, writer = await asyncio.open_connection(*address, limit=limit)
        found = cls(reader, writer, grants=grants)
        found.raw(preface + SettingsFrame(0, settings=settings or {}).serialize())
        if grants:
            found.send(WindowUpdateFrame(0, window_increment=MAX_WINDOW - 65535))
        return found

    def raw(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(data)

    def send(self, frame: Frame) -> None:
        self.raw(frame.serialize())

    def begin(self, stream_id: int, pairs: Pairs, *, is_last: bool = False) -> None:
        flags = ["END_HEADERS", *(["END_STREAM"] if is_last else [])]
        # Nothing is indexed: a test that leaves a block out would put the two tables out of step.
        block = b"".join(
            b"\x00" + _string(name.encode("latin-1")) + _string(value.encode("latin-1"))
            for name, value in pairs
        )
        if len(block) <= 16384:
            self.send(HeadersFrame(stream_id, data=block, flags=flags))
            return
        self.send(HeadersFrame(stream_id, data=block[:16384], flags=flags[1:]))
        for start in range(16384, len(block), 16384):
            flags = ["END_HEADERS"] if start + 16384 >= len(block) else []
            self.send(ContinuationFrame(stream_id, data=block[start : start + 16384], flags=flags))

    def write(self, stream_id: int, data: bytes, *, is_last: bool = True) -> None:
        pieces = [data[at : at + 16384] for at in range(0, len(data), 16384)] or [b""]
        for number, piece in enumerate(pieces, 1):
            flags = ["END_STREAM"] if is_last and number == len(pieces) else []
            self.send(DataFrame(stream_id, data=piece, flags=flags))

    def call(self, stream_id: int, path: str, message: bytes, *more: tuple[str, str]) -> None:
        """A whole unary request."""
        self.begin(stream_id, call_headers(path, *more))
        self.write(stream_id, framed(message))

    def reset(self, stream_id: int, code: int = 8) -> None:
        self.send(RstStreamFrame(stream_id, error_code=code))

    async def drain(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def status(self, stream_id: int, within_s: float = 60.0) -> str:
        """How a stream ended: its grpc-status, `http N`, `reset N`, `goaway N` or `closed`."""
        async with asyncio.timeout(within_s):
            while (found := self.outcome(stream_id)) is None:
                self._news.clear()
                await self._news.wait()
        return found

    def outcome(self, stream_id: int) -> str | None:
        headers = self.headers.get(stream_id, {})
        if "grpc-status" in headers:
            return headers["grpc-status"]
        if headers.get(":status", "200") != "200":
            return f"http {headers[':status']}"
        if stream_id in self.resets:
            return f"reset {self.resets[stream_id]}"
        if self.is_closed:
            return "closed" if self.goaway is None else f"goaway {self.goaway}"
        return None

    async def wait(self, holds: Any, within_s: float = 60.0) -> None:
        async with asyncio.timeout(within_s):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def closed(self, within_s: float = 60.0) -> int | None:
        """Wait for the server to end the connection; the code of its GOAWAY."""
        await self.wait(lambda: self.is_closed, within_s)
        return self.goaway

    async def close(self) -> None:
        self._writer.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def abort(self) -> None:
        self._writer.transport.abort()
        self._task.cancel()

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                frame, size = Frame.parse_frame_header(memoryview(head))
                frame.parse_body(memoryview(await self._reader.readexactly(size)))
                self._take(frame)
                self._news.set()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.is_closed = True
            self._news.set()

    def _take(self, frame: Frame) -> None:
        stream_id = frame.stream_id
        if isinstance(frame, HeadersFrame | ContinuationFrame):
            self._block += frame.data
            if "END_HEADERS" in frame.flags:
                pairs = self._decoder.decode(self._block)
                self._block = b""
                self.headers.setdefault(stream_id, {}).update((str(k), str(v)) for k, v in pairs)
        elif isinstance(frame, DataFrame):
            self.data.setdefault(stream_id, bytearray()).extend(frame.data)
            if self._grants and frame.data:
                for number in (0, stream_id):
                    self.send(WindowUpdateFrame(number, window_increment=frame.flow_controlled_length))
        elif isinstance(frame, RstStreamFrame):
            self.resets[stream_id] = frame.error_code
        elif isinstance(frame, GoAwayFrame):
            self.goaway = frame.error_code
        elif isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            self.send(SettingsFrame(0, flags=["ACK"]))
        elif isinstance(frame, PingFrame):
            if "ACK" in frame.flags:
                self.num_pongs += 1
            else:
                self.send(PingFrame(0, opaque_data=frame.opaque_data, flags=["ACK"]))


def _string(data: bytes) -> bytes:
    """A string of HPACK, not Huffman-coded."""
    size = len(data)
    if size < 127:
        return bytes([size]) + data
    found = bytearray([127])
    size -= 127
    while size >= 128:
        found.append(size % 128 + 128)
        size //= 128
    return bytes([*found, size]) + data
