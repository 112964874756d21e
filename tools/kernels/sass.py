"""Reads a disassembly: instructions, loops, and which of the loops is the hot one.

Standard library only. Knows the text that nvdisasm prints and nothing of how it came to be.

Loops are natural loops of the control flow graph. A branch back from code that the assembler put out of line
is thereby no loop of its own, as it would be for whoever looks at addresses. A loop that waits for a
barrier (its body polls, and computes nothing) is a spin: it is left out of the bodies around it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tools.kernels.flow import loop_bodies

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_[\w.]+):")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")
_TENSOR_CORE = re.compile(r"^(?:HGMMA|QGMMA|IGMMA|BGMMA|HMMA|IMMA|QMMA|OMMA|DMMA|UTC[A-Z]*MMA)\b")
_POLLS = ("TRYWAIT", "NANOSLEEP")
_JUMPS = ("BRA", "JMP")
_ENDS = ("EXIT", "RET", "KILL", "BRX", "JMX", "RPCMOV")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of machine code. `is_always`: it runs whatever a predicate or a uniform condition holds."""

    opcode: str
    operands: str
    is_always: bool

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def is_tensor_core(self) -> bool:
        """Whether it multiplies matrices."""
        return _TENSOR_CORE.match(self.opcode) is not None


@dataclass(slots=True)
class Block:
    """Instructions without a branch into or out of their middle. `label` is "" for one that falls out of a
    branch.
    """

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Loop:
    """One natural loop: its blocks by number, those of spins inside it left out, and what lies within."""

    header: int
    blocks: frozenset[int]
    instructions: tuple[Instruction, ...]
    is_innermost: bool

    @property
    def num_tensor_core(self) -> int:
        """Tensor-core instructions in the body."""
        return sum(instruction.is_tensor_core for instruction in self.instructions)

    @property
    def num_instructions(self) -> int:
        """Instructions of one pass, every branch inside taken as run; NOP is none."""
        return sum(instruction.name != "NOP" for instruction in self.instructions)

    @property
    def num_global_loads(self) -> int:
        """Loads from device memory, asynchronous copies included."""
        return sum(i.name in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP") for i in self.instructions)

    def opcodes(self) -> dict[str, int]:
        """How often each opcode stands in the body, most frequent first."""
        return dict(Counter(i.name for i in self.instructions).most_common())


@dataclass(frozen=True, slots=True)
class Listing:
    """One kernel's machine code."""

    blocks: tuple[Block, ...]
    loops: tuple[Loop, ...]

    def count(self, *names: str) -> int:
        """Instructions with one of these names."""
        return sum(i.name in names for block in self.blocks for i in block.instructions)

    def count_in_loops(self, *names: str) -> int:
        """The same, of those inside of any loop."""
        inside = frozenset[int]().union(*(loop.blocks for loop in self.loops))
        return sum(i.name in names for number in inside for i in self.blocks[number].instructions)

    def tensor_core(self) -> dict[str, int]:
        """How often each tensor-core instruction stands in the code, by name."""
        return dict(Counter(i.name for b in self.blocks for i in b.instructions if i.is_tensor_core))

    @property
    def num_instructions(self) -> int:
        """All instructions but NOP, subroutines included."""
        return sum(i.name != "NOP" for block in self.blocks for i in block.instructions)


def main_loop(loops: Iterable[Loop], index: int | None = None) -> Loop | None:
    """The hot loop: of the innermost loops with a tensor-core instruction the longest, and where there is no
    such loop the longest innermost one that reads device memory, else the longest.

    `index` picks among the innermost loops with tensor-core instructions (all innermost ones if there are
    none) in the order of the code, for a kernel whose longest loop is not the one that runs most.
    """
    innermost = [loop for loop in loops if loop.is_innermost]
    for group in (
        [loop for loop in innermost if loop.num_tensor_core],
        [loop for loop in innermost if loop.num_global_loads],
        innermost,
    ):
        if group and index is not None:
            return group[index] if index < len(group) else None
        if group:
            return max(group, key=lambda loop: loop.num_instructions)
    return None


def parse(text: str) -> Listing:
    """Read what `nvdisasm -c` prints for a cubin with one kernel."""
    blocks = _blocks(text)
    return Listing(tuple(blocks), tuple(_loops(blocks)))


def _blocks(text: str) -> list[Block]:
    blocks = [Block("")]
    for line in text.splitlines():
        if label := _LABEL.match(line):
            blocks.append(Block(label[1]))
        elif found := _INSTRUCTION.match(line):
            predicate, opcode, operands = found.groups()
            name = opcode.partition(".")[0]
            is_conditional = predicate is not None or (name in _JUMPS and "U" in opcode.split(".")[1:])
            # Branches such as `BRA P1, ...` and `BRA.U !UP0, ...` have their condition as an operand.
            is_conditional |= name in _JUMPS and re.match(r"!?U?P\w+\s*,", operands) is not None
            blocks[-1].instructions.append(Instruction(opcode, operands, not is_conditional))
            if name in (*_JUMPS, *_ENDS):
                blocks.append(Block(""))
    blocks = [block for block in blocks if block.label or block.instructions]
    by_label = {block.label: number for number, block in enumerate(blocks) if block.label}
    for number, block in enumerate(blocks):
        block.successors = _successors(number, block, by_label, len(blocks))
    return blocks


def _successors(number: int, block: Block, by_label: dict[str, int], num_blocks: int) -> list[int]:
    after = [number + 1] if number + 1 < num_blocks else []
    if not block.instructions:
        return after
    last = block.instructions[-1]
    if last.name in _ENDS:
        return [] if last.is_always else after
    if last.name not in _JUMPS:
        return after
    target = _TARGET.search(last.operands)
    taken = [by_label[target[1]]] if target and target[1] in by_label else []
    return taken if last.is_always else [*taken, *after]


def _loops(blocks: list[Block]) -> list[Loop]:
    bodies = loop_bodies([block.successors for block in blocks])
    spins = {header for header, body in bodies.items() if _is_spin(blocks, body)}
    real = {header: body for header, body in bodies.items() if header not in spins}
    loops = []
    for header, body in sorted(real.items()):
        own = body.difference(*(bodies[spin] for spin in spins))
        inner = any(other != header and other in body for other in real)
        instructions = tuple(i for number in sorted(own) for i in blocks[number].instructions)
        loops.append(Loop(header, frozenset(own), instructions, not inner))
    return loops


def _is_spin(blocks: list[Block], body: set[int]) -> bool:
    """Whether a loop only waits: it polls a barrier in a few instructions, or does nothing at all."""
    instructions = [i for number in body for i in blocks[number].instructions]
    polls = any(word in i.opcode for i in instructions for word in _POLLS)
    works = any(i.is_tensor_core or i.name in ("LDG", "LDGSTS", "STG") for i in instructions)
    return len(instructions) <= 1 or (polls and not works and len(instructions) <= 12)
