"""Files of load: the Azure LLM inference trace, prompts one a line, conversations as JSON. Knows no load.

Lines that cannot be used are counted, and the count is part of the result.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cli.bench.settings import SettingsError

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MAX_TOKENS = 1 << 24
# The trace has seven digits behind the second; datetime reads at most six.
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace; `at_s` counts from the first."""

    at_s: float
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt, and the most tokens to answer, if the file says."""

    text: str
    max_tokens: int | None = None


def read_trace(path: Path, *, time_scale: float, limit: int | None) -> tuple[tuple[TraceRow, ...], int]:
    """The rows in order of time, times multiplied by `time_scale`, and how many lines were left out.

    With a limit, only the first so many good lines are read. Raises SettingsError.
    """
    found: list[tuple[float, int, int]] = []
    num_bad = 0
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            if missing := [name for name in TRACE_COLUMNS if name not in header]:
                raise SettingsError(f"{path}: no column {missing[0]}; a trace has {','.join(TRACE_COLUMNS)}")
            columns = [header.index(name) for name in TRACE_COLUMNS]
            for row in rows:
                if limit is not None and len(found) >= limit:
                    break
                if not row:
                    continue
                try:
                    time, context, generated = (row[column].strip() for column in columns)
                    entry = (_seconds(time), int(context), int(generated))
                    if not (1 <= entry[1] <= _MAX_TOKENS and 1 <= entry[2] <= _MAX_TOKENS):
                        raise ValueError
                except (ValueError, IndexError, OverflowError):
                    num_bad += 1
                else:
                    found.append(entry)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except csv.Error as error:
        raise SettingsError(f"{path}: {error}") from error
    if not found:
        raise SettingsError(f"{path}: no line that can be used ({num_bad} cannot)")
    found.sort()
    first = found[0][0]
    return tuple(TraceRow((at - first) * time_scale, c, g) for at, c, g in found), num_bad


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(text)
    whole, fraction, zone = match.groups(default="")
    when = datetime.fromisoformat(whole + zone)
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)  # local time would jump where clocks are changed
    return when.timestamp() + float(f"0{fraction}")


def read_texts(path: Path) -> tuple[tuple[TextPrompt, ...], int]:
    """Prompts of a file, and how many entries were left out. Raises SettingsError.

    `.jsonl` is one JSON value a line, `.json` one list of them: a string; an object with `prompt` or `text`,
    and perhaps `max_tokens`; or one with `conversations` or `messages`, of which the first turn of a person
    is taken. Anything else is text, one prompt a line.
    """
    try:
        data = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 at byte {error.start}") from error
    entries: Iterable[Any]
    if path.suffix == ".json":
        try:
            entries = json.loads(data)
        except ValueError as error:
            raise SettingsError(f"{path}: not JSON: {error}") from error
        if not isinstance(entries, list):
            raise SettingsError(f"{path}: not a list")
    elif path.suffix == ".jsonl":
        entries = [_json_or_none(line) for line in data.splitlines() if line.strip()]
    else:
        entries = [line for line in data.splitlines() if line.strip()]
    prompts = [_prompt_of(entry) for entry in entries]
    good = tuple(prompt for prompt in prompts if prompt is not None)
    if not good:
        raise SettingsError(f"{path}: no prompt that can be used ({len(prompts)} cannot)")
    return good, len(prompts) - len(good)


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _prompt_of(entry: Any) -> TextPrompt | None:
    if isinstance(entry, str):
        return TextPrompt(entry) if entry.strip() else None
    if not isinstance(entry, dict):
        return None
    text: Any = entry.get("prompt", entry.get("text"))
    turns = entry.get("conversations", entry.get("messages"))
    if text is None and isinstance(turns, list):
        asked = (
            turn.get("value", turn.get("content"))
            for turn in turns
            if isinstance(turn, dict) and turn.get("from", turn.get("role")) in ("human", "user")
        )
        text = next(asked, None)
    limit = entry.get("max_tokens")
    is_limit = type(limit) is int and 0 < limit <= _MAX_TOKENS
    return TextPrompt(text, limit if is_limit else None) if isinstance(text, str) and text.strip() else None
