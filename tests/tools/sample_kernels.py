"""Launches for the compile lane's tests: one that holds its gates, and one for each way to break them."""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.kernels.gpu.compile_case import CompileCase


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows, columns, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + start + inner[None, :])
        b = tl.load(b_ptr + columns[None, :] * K + start + inner[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + rows[:, None] * BLOCK_N + columns[None, :], acc)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for row in range(num_rows):
        acc += tl.load(x_ptr + row.to(tl.int64) * BLOCK + lanes)
    tl.store(out_ptr + lanes, acc)


PRODUCT = {"a_ptr": "*fp16", "b_ptr": "*fp16", "out_ptr": "*fp32", "K": "i32"}
SUM = {"x_ptr": "*fp32", "out_ptr": "*fp32", "num_rows": "i32"}


def product(
    name: str, m: int, n: int, k: int, warps: int = 4, stages: int = 2, **more: object
) -> CompileCase:
    constexprs = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return CompileCase(name, _product_kernel, PRODUCT, constexprs, warps, stages, **more)


def row_sum(name: str, **more: object) -> CompileCase:
    unaligned = frozenset({"num_rows"})
    return CompileCase(name, _sum_kernel, SUM, {"BLOCK": 512}, 4, 1, unaligned=unaligned, **more)


def compile_cases() -> list[CompileCase]:
    fp8_like = {"sm_80": "no such type there"}
    return [
        product(
            "good/product",
            64,
            64,
            64,
            elements_per_iteration=64 * 64,
            max_instructions=5.0,
            has_tensor_cores=True,
            notes=fp8_like,
        ),
        row_sum("good/sum", elements_per_iteration=512),
        product("bad/spills", 128, 128, 16, warps=1),
        product("ungated/spills", 128, 128, 16, warps=1, is_gated=False),
        row_sum("bad/no_tensor_core", has_tensor_cores=True),
        product("bad/too_long", 64, 64, 64, elements_per_iteration=64 * 64, max_instructions=0.1),
        product("bad/shared_memory", 128, 256, 128, warps=8, stages=4),
        product("bad/no_figure", 64, 64, 64, max_instructions=9.0),
        CompileCase("bad/arguments", _sum_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 512}, 4, 1),
    ]
