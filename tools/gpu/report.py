"""The device lane's JSON and table. Knows rows; measures nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.gpu.phases import PhaseResult

DRY_NOTICE = "DRY RUN on the CPU, through Triton's interpreter: these figures are no measurements."


def write_json(path: Path, machine: dict[str, str], results: list[PhaseResult], is_dry: bool) -> None:
    """Everything known so far; replaced as a whole after each phase."""
    document = {"is_dry": is_dry, "machine": machine, "phases": [asdict(result) for result in results]}
    if is_dry:
        document = {"notice": DRY_NOTICE, **document}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def number(value: float | None) -> str:
    """Three significant digits, or nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table: case, median, spread, baseline, ratio, target, remark."""
    if row["status"] != "ok":
        return (row["case"], "", "", "", "", "", f"{row['status'].upper()} {row['note']}".strip())
    spread = f"{number(row['p20'])} .. {number(row['p80'])}" if row["p20"] is not None else ""
    base = f"{row['baseline']} {number(row['baseline_median'])}".strip() if row["baseline"] else ""
    return (
        row["case"],
        f"{number(row['median'])} {row['unit']}" if row["median"] is not None else "",
        spread,
        base,
        number(row["ratio"]),
        _target(row),
        row["note"],
    )


def _target(row: dict[str, Any]) -> str:
    target = row["target"]
    if target is None:
        return ""
    value = row["ratio"] if row["ratio"] is not None else row["median"]
    is_met = value <= target if row["is_low_good"] else value >= target
    return f"{number(target)} {'met' if is_met else 'missed'}"


HEADER = ("case", "median", "p20 .. p80", "baseline", "ratio", "target", "")


def table(results: list[PhaseResult], machine: dict[str, str], is_dry: bool) -> str:
    """All phases, a heading each."""
    lines = [DRY_NOTICE] if is_dry else []
    lines.append(", ".join(f"{key} {value}" for key, value in machine.items()))
    every = [line(row) for result in results for row in result.rows]
    widths = [max(map(len, column)) for column in zip(HEADER, *every, strict=True)]
    for result in results:
        remark = f" ({result.note})" if result.note else ""
        lines.append(f"\n{result.name}: {result.outcome}{remark}, {result.seconds:.0f} s")
        for cells in [HEADER, *map(line, result.rows)] if result.rows else []:
            padded = [cell.ljust(width) for cell, width in zip(cells[:-1], widths, strict=False)]
            lines.append("  " + "  ".join([*padded, cells[-1]]).rstrip())
    if is_dry:
        lines.append(f"\n{DRY_NOTICE}")
    return "\n".join(lines)
