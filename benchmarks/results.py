"""The one table of measured results: its columns, and how rows are added. Knows no benchmark."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

PATH = Path(__file__).with_name("results.csv")
COLUMNS = (
    "benchmark",
    "case",
    "unit",
    "median",
    "p20",
    "p80",
    "baseline",
    "baseline_median",
    "ratio",
    "machine",
    "git_sha",
)


def append(rows: Iterable[Sequence[object]], path: Path = PATH) -> None:
    """Add rows of len(COLUMNS) values; the header comes with the first. Raises ValueError for other
    lengths.
    """
    rows = list(rows)
    if wrong := [row for row in rows if len(row) != len(COLUMNS)]:
        raise ValueError(f"{len(COLUMNS)} columns expected, found {len(wrong[0])}: {wrong[0]}")
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows] if is_new else rows)
