"""What the machine code must hold to. Pure: facts in, complaints out.

sm_90 is the machine the kernels are made for: there a spill, a missing tensor-core instruction or a main loop
over its bound fails. Everywhere a kernel must compile and fit into a block's shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.kernels.gpu.compile_case import CompileCase
from tools.kernels.machine_code import Facts

GATE_ARCH = 90


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """What one multiprocessor holds, and how much shared memory one block may have. Bytes; CUDA C++
    programming guide, table of technical specifications per compute capability.
    """

    shared: int
    shared_per_block: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


MULTIPROCESSORS = {
    80: Multiprocessor(shared=164 * 1024, shared_per_block=163 * 1024),
    90: Multiprocessor(shared=228 * 1024, shared_per_block=227 * 1024),
    100: Multiprocessor(shared=228 * 1024, shared_per_block=227 * 1024),
}


def resident_blocks(facts: Facts) -> int:
    """Blocks that fit on one multiprocessor by registers (allotted to a warp by 256), shared memory (1 KiB of
    it the system's, per block) and warps.
    """
    machine = MULTIPROCESSORS[facts.arch]
    per_warp = -(-facts.registers * 32 // 256) * 256
    by_registers = machine.registers // max(1, per_warp * facts.num_warps)
    by_shared = machine.shared // (facts.shared + 1024)
    return min(by_registers, by_shared, machine.warps // max(1, facts.num_warps), machine.blocks)


def failures(case: CompileCase, facts: Facts) -> list[str]:
    """Why this case fails the build; empty when it holds, or is skipped with a reason."""
    if facts.skipped:
        return []
    if facts.error:
        return [f"does not compile: {facts.error}"]
    found = []
    limit = MULTIPROCESSORS[facts.arch].shared_per_block
    if facts.shared > limit:
        found.append(f"{facts.shared} bytes of shared memory, a block has {limit}")
    if facts.arch == GATE_ARCH:
        if case.is_gated and (num_spills := facts.loop_spills if "spills" in case.notes else facts.spills):
            found.append(f"{num_spills} spill instructions")
        if case.has_tensor_cores and not facts.tensor_core:
            found.append("no tensor-core instruction")
        found.extend(_loop_failures(case, facts))
    return found


def _loop_failures(case: CompileCase, facts: Facts) -> list[str]:
    if case.max_instructions is None:
        return []
    if facts.main_loop is None:
        return ["no main loop to count"]
    if facts.main_loop.per_element is None:
        return ["max_instructions without elements_per_iteration"]
    if case.has_tensor_cores and not facts.main_loop.num_tensor_core:
        return ["no tensor-core instruction in the main loop"]
    if facts.main_loop.per_element > case.max_instructions:
        return [f"{facts.main_loop.per_element:.2f} instructions per element, gate {case.max_instructions}"]
    return []


def remarks(case: CompileCase, facts: Facts) -> list[str]:
    """What is worth a look and fails nothing: spills and missing tensor cores off the gate's architecture."""
    found = []
    if facts.skipped:
        return [f"skipped: {facts.skipped}"]
    if facts.error:
        return []
    if facts.spills and not any("spill" in failure for failure in failures(case, facts)):
        found.append(f"{facts.spills} spill instructions, {facts.loop_spills} of them in loops")
    if case.has_tensor_cores and facts.arch != GATE_ARCH and not facts.tensor_core:
        found.append("no tensor-core instruction")
    if facts.main_loop is not None and facts.main_loop.unroll > 1:
        found.append(f"loop unrolled {facts.main_loop.unroll} times")
    return found
