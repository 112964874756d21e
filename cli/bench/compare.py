"""Two results side by side. Reads documents alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from cli.bench.table import PLAIN, number

SCHEMA, SCHEMA_VERSION = "weft-bench", 1
# What must be equal for a ratio to mean anything; who was asked, and over what, may differ.
_ALIKE = (
    "workload",
    "num_requests",
    "duration_s",
    "arrivals",
    "burstiness",
    "max_concurrency",
    "targets",
    "cancel_fraction",
    "slow_fraction",
    "slow_pause_s",
    "num_warmup",
    "seed",
)
_RATES = (
    ("requests_per_s", "requests/s"),
    ("output_tokens_per_s", "output tokens/s"),
    ("goodput_requests_per_s", "goodput, requests/s"),
)
_LATENCIES = (("ttft", "TTFT"), ("itl", "ITL"), ("tpot", "TPOT"), ("e2e", "end to end"))


class CompareError(ValueError):
    """Files that are no results, or results that are not alike. The message is one line."""


def read_document(path: Path) -> dict[str, Any]:
    """A result. Raises CompareError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CompareError(f"{path}: not JSON") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise CompareError(f"{path}: not a result of weft bench")
    if document.get("version") != SCHEMA_VERSION:
        raise CompareError(f"{path}: schema version {document.get('version')}; this reads {SCHEMA_VERSION}")
    if not document.get("points"):
        raise CompareError(f"{path}: holds no measurement")
    return document


def differences(base: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is unlike in the two workloads, one line each."""
    found = []
    for name in _ALIKE:
        a, b = base["settings"].get(name), other["settings"].get(name)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            unlike = {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys())}
            found += [f"{name}.{key}: {x} and {y}" for key, (x, y) in unlike.items() if x != y]
        else:
            found.append(f"{name}: {a} and {b}")
    if not set(_points(base)) & set(_points(other)):
        found.append("loads: none is in both")
    return found


def compare_table(
    base: dict[str, Any], other: dict[str, Any], *, is_forced: bool = False
) -> tuple[Table, list[str]]:
    """A table of both and B / A, and what to know about it. Raises CompareError for unlike workloads unless
    forced, and for results without a load in common.
    """
    unlike = differences(base, other)
    if unlike and not is_forced:
        raise CompareError(f"the workloads differ (--force compares all the same): {'; '.join(unlike)}")
    mine, theirs = _points(base), _points(other)
    common = [label for label in mine if label in theirs]
    if not common and len(mine) == len(theirs) == 1:
        (a_label, a), (b_label, b) = *mine.items(), *theirs.items()
        pairs = [(f"{a_label} | {b_label}", a, b)]
    else:
        pairs = [(label, mine[label], theirs[label]) for label in common]
    if not pairs:
        raise CompareError("the two results have no load in common")
    table = Table(**PLAIN)
    for heading in ("load", "", "A", "B", "B / A"):
        table.add_column(heading, justify="left" if heading in ("load", "") else "right", no_wrap=True)
    for label, a, b in pairs:
        shown = label
        for title, x, y in _rows(a, b):
            ratio = y / x if x and y is not None else None
            table.add_row(shown, title, number(x), number(y), "-" if ratio is None else f"{ratio:.2f}x")
            shown = ""
        table.add_section()
    notes = [f"unlike: {line}" for line in unlike]
    notes += [
        f"only in {'A' if label in mine else 'B'}: {label}" for label in sorted(mine.keys() ^ theirs.keys())
    ]
    if base["machine"]["cpu"] != other["machine"]["cpu"]:
        notes.append(
            f"the clients ran on different machines: {base['machine']['cpu']}, {other['machine']['cpu']}"
        )
    for name, document in (("A", base), ("B", other)):
        notes += [
            f"{name} {point['load']['label']}: {warning}"
            for point in document["points"]
            for warning in point["warnings"]
        ]
    return table, notes


def _points(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {point["load"]["label"]: point for point in document["points"]}


def _rows(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    rows: list[tuple[str, float | None, float | None]] = [
        ("failed requests", a["requests"]["failed"], b["requests"]["failed"])
    ]
    rows += [(title, a["throughput"][name], b["throughput"][name]) for name, title in _RATES]
    rows += [
        (f"{title} {key}, ms", a["latency_ms"][name][key], b["latency_ms"][name][key])
        for name, title in _LATENCIES
        for key in ("p50", "p90", "p99")
    ]
    return [row for row in rows if row[1] is not None or row[2] is not None]
