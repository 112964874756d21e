"""Structured logs: one JSON line per event, human lines on a terminal. Logging never blocks the caller.

Records go into a bounded queue that one thread drains; when the queue is full a record is dropped and
counted, and the count is logged as soon as there is room. No text from outside can forge a line: control
characters are escaped. Knows no service.

    log = logs.get_logger("engine")
    log.info("ready", model="demo", blocks=512)
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import queue
import sys
import threading
import time
from contextvars import ContextVar
from typing import Any, TextIO

from weft.stacks import stack_text

MAX_QUEUED_RECORDS = 10_000
MAX_VALUE_CHARS = 4096
MAX_LINE_CHARS = 256 << 10
LEVELS = ("debug", "info", "warning", "error")

# Set for the duration of one request, so that every event of it carries the id.
request_id: ContextVar[str | None] = ContextVar("weft_request_id", default=None)


class Logger:
    """Logs events: a short fixed name and fields."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, /, **fields: Any) -> None:
        """Log at DEBUG."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        """Log at INFO."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        """Log at WARNING."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        """Log at ERROR."""
        self._log(logging.ERROR, event, fields)

    def failure(self, event: str, error: BaseException, /, **fields: Any) -> None:
        """Log at ERROR with the stack of `error`."""
        self._log(logging.ERROR, event, fields, error)

    def _log(
        self, level: int, event: str, fields: dict[str, Any], exception: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            exc_info = (type(exception), exception, exception.__traceback__) if exception else None
            extra = {"weft_event": event, "weft_fields": list(fields.items())}
            self._logger.log(level, "%s", event, extra=extra, exc_info=exc_info)


def get_logger(name: str) -> Logger:
    """The logger of one part, as in "engine" or "rpc"."""
    return Logger(logging.getLogger(f"weft.{name}"))


_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> list[tuple[str, Any]]:
    """What a caller of the standard library's logging passed as `extra`."""
    return [
        (key, value)
        for key, value in vars(record).items()
        if key not in _STANDARD_ATTRIBUTES and not key.startswith("weft_")
    ]


def event_of(record: logging.LogRecord, *, is_private: bool = False) -> dict[str, Any]:
    """A record as the fields of one line. Foreign records (of libraries) have their message as the event, its
    first line if `is_private`: asyncio, for one, quotes exceptions in the rest.
    """
    message = record.getMessage() if getattr(record, "weft_event", None) is None else ""
    event: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        + f".{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name.removeprefix("weft."),
        "event": getattr(record, "weft_event", None)
        or (message.partition("\n")[0] if is_private else message),
    }
    current = getattr(record, "weft_request_id", None)
    if current:
        event["request_id"] = current
    for key, value in getattr(record, "weft_fields", None) or _extras(record):
        event.setdefault(key, value)
    if record.exc_info and record.exc_info[1] is not None:
        event["stack"] = stack_text(record.exc_info[1], is_private=is_private)
    return event


def _clip(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_VALUE_CHARS:
        return value[:MAX_VALUE_CHARS] + "..."
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    return value


def json_line(record: logging.LogRecord, *, is_private: bool = False) -> str:
    """One JSON object in ASCII: nothing in it can end the line or drive a terminal. A line that would be
    longer than `MAX_LINE_CHARS` keeps what tells it from others.
    """
    event = event_of(record, is_private=is_private)
    fields = {key: value if key == "stack" else _clip(value) for key, value in event.items()}
    line = json.dumps(fields, default=lambda value: _clip(str(value)))
    if len(line) <= MAX_LINE_CHARS:
        return line
    kept = {key: fields[key] for key in ("time", "level", "logger", "event")}
    return json.dumps({**kept, "shortened_from": len(line)})


def escape(text: str) -> str:
    """The text with every character escaped that is not printable: line ends, ANSI sequences, bidi
    overrides.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def human_line(record: logging.LogRecord, *, is_private: bool = False) -> str:
    """One line for a person: clock, level, event, fields; a stack follows on lines of its own, indented."""
    event = event_of(record, is_private=is_private)
    stack = event.pop("stack", "")
    clock, level, name = event.pop("time")[11:-1], event.pop("level"), event.pop("logger")
    head = f"{clock} {level:7s} {name}: {escape(str(event.pop('event')))}"
    fields = "".join(f" {escape(str(key))}={escape(str(_clip(value)))}" for key, value in event.items())
    lines = "".join(f"\n    {escape(line)}" for line in stack.splitlines())
    return head + fields + lines


class _QueueHandler(logging.Handler):
    """Puts records into a bounded queue, or counts them as dropped."""

    def __init__(self, records: queue.Queue[logging.LogRecord | None]) -> None:
        super().__init__()
        self._records = records
        self.num_dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        record.weft_request_id = request_id.get()
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1


class LogWriter:
    """Owns the queue, the thread that writes, and the handler on the root logger."""

    def __init__(
        self,
        stream: TextIO,
        *,
        is_human: bool,
        level: int,
        max_records: int = MAX_QUEUED_RECORDS,
        is_private: bool = False,
    ) -> None:
        self._stream = stream
        self._format = functools.partial(human_line if is_human else json_line, is_private=is_private)
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(max_records)
        self.handler = _QueueHandler(self._records)
        self.handler.setLevel(level)
        self._num_reported = 0
        # A daemon: a reader of our output that stopped reading must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="weft-logs", daemon=True)

    @property
    def num_dropped(self) -> int:
        """Records dropped because the queue was full."""
        return self.handler.num_dropped

    def start(self) -> None:
        """Start the thread and take over the root logger."""
        self._thread.start()
        logging.getLogger().addHandler(self.handler)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Write what is queued and end the thread, within `timeout_s`. May come twice."""
        logging.getLogger().removeHandler(self.handler)
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=timeout_s)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            self._write(self._format_safely(record))
            dropped = self.num_dropped
            if dropped > self._num_reported:
                note = logging.makeLogRecord(
                    {"levelno": logging.WARNING, "levelname": "WARNING", "name": "weft.logs"}
                )
                note.weft_event = "records dropped"
                note.weft_fields = [("dropped", dropped - self._num_reported)]
                self._num_reported = dropped
                self._write(self._format(note))

    def _format_safely(self, record: logging.LogRecord) -> str:
        try:
            return self._format(record)
        except (
            Exception
        ) as error:  # a record that cannot be written must not end the thread that writes the others
            return json.dumps({"level": "error", "event": "unwritable record", "error": type(error).__name__})

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            # The stream is gone; there is nowhere left to say so.
            self.handler.num_dropped += 1


_writer: LogWriter | None = None


def start(
    level: str = "info",
    *,
    stream: TextIO | None = None,
    is_human: bool | None = None,
    is_private: bool = False,
) -> LogWriter:
    """Send all logging of this process to `stream` (standard error), as JSON lines unless it is a terminal.

    `level`: one of LEVELS. `is_private`: for a process that sees clients' text; what an exception says is
    then withheld where it may quote some. A second call replaces the first.
    """
    global _writer
    stop()
    stream = stream or sys.stderr
    number = getattr(logging, level.upper())
    writer = LogWriter(
        stream,
        is_human=stream.isatty() if is_human is None else is_human,
        level=number,
        is_private=is_private,
    )
    root = logging.getLogger()
    # Libraries speak from WARNING on; our own events from the level asked for.
    root.setLevel(max(number, logging.WARNING))
    logging.getLogger("weft").setLevel(number)
    writer.start()
    _writer = writer
    return writer


def set_level(level: str) -> None:
    """Log from another level on; one of LEVELS."""
    number = getattr(logging, level.upper())
    if _writer is not None:
        _writer.handler.setLevel(number)
    logging.getLogger().setLevel(max(number, logging.WARNING))
    logging.getLogger("weft").setLevel(number)


def state() -> tuple[str, int]:
    """The level, and how many records were dropped because whoever reads them was too slow."""
    level = logging.getLevelName(logging.getLogger("weft").getEffectiveLevel()).lower()
    return level, _writer.num_dropped if _writer is not None else 0


def stop() -> None:
    """Write what is queued. The last thing a process does."""
    global _writer
    if _writer is not None:
        _writer.stop()
        _writer = None
