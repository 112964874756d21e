"""Loops read off listings: what is a loop, what is a wait, which one is hot."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")
from services.engine.kernels.gpu.compile_case import CompileCase
from tools.kernels import ptx
from tools.kernels.flow import loop_bodies
from tools.kernels.gates import failures, remarks
from tools.kernels.machine_code import Facts
from tools.kernels.sass import main_loop, parse


def listing(*lines: str) -> str:
    """Lines as nvdisasm prints them: labels as they are, instructions with an offset."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * number:04x}*/    {line} ;"
        for number, line in enumerate(lines)
    )


NESTED = listing(
    "MOV R1, R2",
    ".L_x_1:",
    "IADD3 R1, R1, 1, RZ",
    ".L_x_2:",
    "LDG.E R4, [R2]",
    "HMMA.16816.F32 R8, R4, R6, R8",
    "NOP",
    "@P0 BRA `(.L_x_2)",
    "STG.E [R2], R8",
    "@!P1 BRA `(.L_x_1)",
    "EXIT",
    ".L_x_3:",
    "BRA `(.L_x_3)",
)


def test_nested_loops_and_the_trap_after_the_end() -> None:
    read = parse(NESTED)
    assert [(loop.num_instructions, loop.is_innermost) for loop in read.loops] == [(6, False), (3, True)]
    hot = main_loop(read.loops)
    assert hot is not None
    assert hot.num_tensor_core == 1
    assert hot.num_global_loads == 1
    assert hot.opcodes() == {"LDG": 1, "HMMA": 1, "NOP": 1, "BRA": 1}
    assert read.tensor_core() == {"HMMA": 1}
    assert read.num_instructions == 9


def test_a_wait_out_of_line_is_no_loop_and_no_part_of_one() -> None:
    """The assembler puts the slow side of a barrier's wait behind the end; it branches back into the loop."""
    read = parse(
        listing(
            ".L_x_1:",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR4], R2",
            "@!P4 BRA `(.L_x_8)",
            ".L_x_2:",
            "UTCHMMA tmem[UR4], gdesc[UR6], tmem[UR8], idesc[UR9], UPT",
            "BRA.U !UP0, `(.L_x_1)",
            "EXIT",
            ".L_x_8:",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR4], R2",
            "@!P4 BRA `(.L_x_8)",
            "BRA `(.L_x_2)",
        )
    )
    (loop,) = read.loops
    assert loop.is_innermost
    assert loop.num_tensor_core == 1
    assert loop.num_instructions == 5, "two before the branch, two after it, one on the way back"


def test_unconditional_branches_do_not_fall_through() -> None:
    read = parse(listing("BRA `(.L_x_2)", ".L_x_1:", "MOV R1, R2", ".L_x_2:", "EXIT", "BRA `(.L_x_1)"))
    assert read.loops == ()


def test_uniform_and_operand_conditions_are_branches_with_two_ways() -> None:
    for branch in ("BRA.U UP1, `(.L_x_1)", "BRA P2, `(.L_x_1)", "@P0 BRA `(.L_x_1)", "BRA.U !UP0, `(.L_x_1)"):
        read = parse(listing(".L_x_1:", "LDG.E R4, [R2]", branch, ".L_x_2:", "FADD R1, R1, R4", "EXIT"))
        assert len(read.loops) == 1, branch
        assert read.blocks[0].successors == [0, 1], branch


def test_the_hot_loop_is_the_longest_with_tensor_cores_unless_told() -> None:
    def loop(label: int, *body: str) -> list[str]:
        return [f".L_x_{label}:", *body, f"@P0 BRA `(.L_x_{label})"]

    product = "HGMMA.64x64x16.F32 R8, R4, gdesc[UR4], R8"
    read = parse(
        listing(
            *loop(1, "LDG.E R1, [R2]", *["FADD R1, R1, R1"] * 50),
            *loop(2, product, product),
            *loop(3, product, "FMUL R1, R1, R2", "FMUL R1, R1, R2"),
            *loop(4, *["FADD R1, R1, R1"] * 90),
            "EXIT",
        )
    )
    assert [main_loop(read.loops, index).num_instructions for index in (None, 0, 1)] == [4, 3, 4]  # type: ignore[union-attr]
    assert main_loop(read.loops, 2) is None
    without = [loop for loop in read.loops if not loop.num_tensor_core]
    assert main_loop(without).num_instructions == 52  # type: ignore[union-attr]
    assert main_loop(without[1:]).num_instructions == 91  # type: ignore[union-attr]
    assert main_loop([]) is None


def test_spills_and_empty_listings() -> None:
    assert parse("").loops == ()
    loop = (".L_x_1:", "STL [R1], R2", "LDGSTS.E [R1], [R2.64]", "@P0 BRA `(.L_x_1)", "EXIT")
    read = parse(listing("@P0 LDL.LU R1, [R1+0x4]", *loop))
    assert read.count("LDL", "STL") == 2
    assert read.count_in_loops("LDL", "STL") == 1


def test_spills_outside_of_loops_are_accepted_with_a_reason_only() -> None:
    strict = CompileCase("one", None, {}, {}, 4, 3)
    lenient = replace(strict, notes={"spills": "saved before the loop"})
    before, inside = (Facts("one", 90, spills=14, loop_spills=count) for count in (0, 3))
    assert failures(strict, before) == ["14 spill instructions"]
    assert failures(lenient, before) == []
    assert remarks(lenient, before) == ["14 spill instructions, 0 of them in loops"]
    assert failures(lenient, inside) == ["3 spill instructions"]
    assert failures(replace(strict, is_gated=False), inside) == []
    assert failures(strict, replace(inside, arch=80)) == []


def test_loops_of_a_graph() -> None:
    assert loop_bodies([]) == {}
    assert loop_bodies([[1], [2], [1, 3], []]) == {1: {1, 2}}
    assert loop_bodies([[1, 2], [2], [1, 3], []]) == {}, "neither block dominates the other: no natural loop"
    nested = [[1], [2], [2, 3], [1, 4], []]
    assert loop_bodies(nested) == {1: {1, 2, 3}, 2: {2}}
    assert loop_bodies([[1], [1], [2]]) == {1: {1}}, "block 2 is never reached"


def test_a_loop_of_ptx_need_not_lie_in_one_piece() -> None:
    """As LLVM lays out a loop around inline assembly that waits: its latch stands before its header."""
    text = """
        @%p1 bra $L__BB0_9;
        bra.uni $L__BB0_2;
$L__BB0_6:
        @!complete bra.uni waitLoop;
        @%p2 bra $L__BB0_2;
        bra.uni $L__BB0_9;
$L__BB0_2:
        cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 16;
        @%p3 bra $L__BB0_4;
        @%p4 tcgen05.mma.cta_group::1.kind::f16 [ %r4 ], [ %r3 ], %rd4, %r3, %p9;
        @%p4 tcgen05.mma.cta_group::1.kind::f16 [ %r4 ], [ %r3 ], %rd5, %r3, %p9;
$L__BB0_4:
        bra.uni $L__BB0_6;
$L__BB0_9:
        ld.global.b32 %r1, [ %rd1 ];
        @%p5 bra $L__BB0_9;
        ret;
"""
    assert sorted(ptx.innermost_loops(text)) == [(0, 1), (2, 1)]
