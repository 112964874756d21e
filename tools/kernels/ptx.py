"""Counts what stands in the loops of PTX: what the assembler was given, to tell how often it repeated it.

Standard library only. A label that is not LLVM's own belongs to inline assembly, which waits in loops that
compute nothing: such branches are taken as falling through.
"""

from __future__ import annotations

import re

from tools.kernels.flow import loop_bodies

_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"^\s*(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)")
_END = re.compile(r"^\s*(?:ret|exit|trap)\b")
_TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
_GLOBAL_LOAD = re.compile(r"\b(?:ld\.global|cp\.async\.c[ag])\b")


def innermost_loops(text: str) -> list[tuple[int, int]]:
    """(tensor-core instructions, loads from device memory) of every innermost loop."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(blocks)
            blocks.append([])
        else:
            blocks[-1].append(line)
            if _BRANCH.match(line) or _END.match(line):
                blocks.append([])
    successors = [_successors(number, lines, labels, len(blocks)) for number, lines in enumerate(blocks)]
    bodies = loop_bodies(successors)
    innermost = [body for h, body in bodies.items() if not any(o != h and o in body for o in bodies)]
    return [(_count(_TENSOR_CORE, blocks, body), _count(_GLOBAL_LOAD, blocks, body)) for body in innermost]


def _count(pattern: re.Pattern[str], blocks: list[list[str]], body: set[int]) -> int:
    return sum(pattern.search(line) is not None for number in body for line in blocks[number])


def _successors(number: int, lines: list[str], labels: dict[str, int], num_blocks: int) -> list[int]:
    after = [number + 1] if number + 1 < num_blocks else []
    last = lines[-1] if lines else ""
    if _END.match(last):
        return []
    branch = _BRANCH.match(last)
    if branch is None:
        return after
    taken = [labels[branch[2]]] if branch[2] in labels else []
    return [*taken, *after] if branch[1] else taken
