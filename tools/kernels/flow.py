"""Natural loops of a control flow graph. Knows numbers of blocks and who follows whom; no instruction set."""

from __future__ import annotations

from collections.abc import Sequence


def loop_bodies(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """{header: blocks} of every natural loop of the code that is reached from block 0.

    A loop is a branch to a block that dominates it, and every block from which that branch is reached without
    passing its target. Loops with one header are one.
    """
    if not successors:
        return {}
    dominators = _dominators(successors)
    predecessors = _predecessors(successors, set(dominators))
    bodies: dict[int, set[int]] = {}
    for number in dominators:
        for header in successors[number]:
            if header in dominators[number]:
                body = bodies.setdefault(header, {header})
                stack = [number]
                while stack:
                    if (block := stack.pop()) not in body:
                        body.add(block)
                        stack.extend(predecessors[block])
    return bodies


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Blocks that every way from the first to a block passes; only blocks that can be reached."""
    reached, stack = {0}, [0]
    while stack:
        for successor in successors[stack.pop()]:
            if successor not in reached:
                reached.add(successor)
                stack.append(successor)
    predecessors = _predecessors(successors, reached)
    dominators = {number: set(reached) for number in reached}
    dominators[0] = {0}
    is_changed = True
    while is_changed:
        is_changed = False
        for number in sorted(reached - {0}):
            common = set.intersection(*(dominators[p] for p in predecessors[number])) | {number}
            if common != dominators[number]:
                dominators[number], is_changed = common, True
    return dominators


def _predecessors(successors: Sequence[Sequence[int]], reached: set[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {number: [] for number in reached}
    for number in reached:
        for successor in successors[number]:
            found[successor].append(number)
    return found
