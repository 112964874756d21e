"""What the compile lane needs to know of one launch of one kernel: enough to make its machine code without a
GPU.

Standard library only. Every kernel module lists its launches in `compile_cases()`, as its launcher would make
them; `tools/kernels` compiles them and reads registers, spills and instructions off the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One launch.

    Attributes:
        name: unique, as in "w4a16/rows16/group128".
        kernel: the `@triton.jit` function.
        signature: Triton type of every argument that is no constexpr, by name: "*bf16", "i32", "fp32".
        constexprs: value of every constexpr argument, by name.
        num_warps, num_stages: as launched.
        unaligned: names of arguments that need not be divisible by 16 (pointers and sizes are taken as such
            unless listed here; a scalar that may be any number must be listed).
        elements_per_iteration: weights, or K and V values together, that one pass of the main loop handles in
            one program; 0 when there is no such figure.
        max_instructions: gate on sm_90 for SASS instructions per element of the main loop; None has no gate.
        has_tensor_cores: whether the machine code must hold a tensor-core instruction (sm_90).
        is_gated: whether spills fail the build.
        has_fp_fusion: whether the compiler may make a product and a sum into one operation, as launched.
        max_registers: bound on a thread's registers, as launched with maxnreg; None where there is none.
        notes: "sm_80" and so on: why that architecture does not have this launch; "loop": which of the
            innermost loops with tensor-core instructions is the main one, in the order of the code; "spills":
            why those outside of loops, which run once, are accepted.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    unaligned: frozenset[str] = frozenset()
    elements_per_iteration: int = 0
    max_instructions: float | None = None
    has_tensor_cores: bool = False
    is_gated: bool = True
    has_fp_fusion: bool = True
    max_registers: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
