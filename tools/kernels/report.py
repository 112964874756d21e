"""The table and the JSON of the compile lane. Knows facts and complaints, no compiler."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from tools.kernels.cases import Entry
from tools.kernels.gates import failures, remarks, resident_blocks
from tools.kernels.machine_code import Facts

HEADER = ("case", "sm", "regs", "spills", "smem", "blocks", "tensor core", "loop", "per elt", "gate", "")


def row(entry: Entry, facts: Facts) -> tuple[str, ...]:
    """One line of the table: shared memory in KiB, blocks that fit on a multiprocessor, tensor-core
    instructions, SASS instructions of the main loop and per element of it, the bound, what was found.
    """
    said = [*("FAIL " + failure.splitlines()[0][:160] for failure in failures(entry.case, facts))]
    said += remarks(entry.case, facts)
    verdict = "; ".join(said) or "ok"
    if facts.error or facts.skipped:
        return (entry.case.name, str(facts.arch), *[""] * 8, verdict)
    loop = facts.main_loop
    bound = entry.case.max_instructions
    return (
        entry.case.name,
        str(facts.arch),
        str(facts.registers),
        str(facts.spills),
        f"{facts.shared / 1024:.1f}",
        str(resident_blocks(facts)),
        " ".join(f"{count} {name}" for name, count in facts.tensor_core.items()) or "-",
        str(loop.num_instructions) if loop else "-",
        f"{loop.per_element:.2f}" if loop and loop.per_element is not None else "-",
        f"{bound:g}" if bound is not None else "-",
        verdict,
    )


def table(rows: list[tuple[str, ...]], is_markdown: bool = False) -> str:
    """Aligned text, or a Markdown table."""
    if is_markdown:
        lines = [HEADER, ("---",) * len(HEADER), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[column]) for line in (HEADER, *rows)) for column in range(len(HEADER) - 1)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]
        ).rstrip()
        for line in (HEADER, *rows)
    )


def details(facts: Facts) -> str:
    """The main loop's opcodes and every loop, for whoever wants to make it shorter."""
    lines = [f"{facts.name} sm_{facts.arch}: {facts.num_instructions} instructions, {facts.num_warps} warps"]
    for size, tensor_core, is_innermost in facts.loops:
        kind = "innermost" if is_innermost else "outer"
        lines.append(f"  loop of {size} instructions, {tensor_core} on tensor cores, {kind}")
    if facts.main_loop:
        opcodes = ", ".join(f"{count} {name}" for name, count in facts.main_loop.opcodes.items())
        lines.append(f"  main loop: {opcodes}")
    return "\n".join(lines)


def write_json(path: Path, entries: list[tuple[Entry, Facts]], triton_version: str) -> None:
    """All facts with gates and complaints, as {"triton": version, "cases": [...]}."""
    cases = [
        {
            "module": entry.module,
            **asdict(facts),
            "resident_blocks": 0 if facts.error or facts.skipped else resident_blocks(facts),
            "max_instructions": entry.case.max_instructions,
            "failures": failures(entry.case, facts),
            "remarks": remarks(entry.case, facts),
        }
        for entry, facts in entries
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"triton": triton_version, "cases": cases}, indent=1) + "\n", encoding="utf-8")
