"""silu(gate) * up or gelu(gate) * up, the gate of an MLP, in one pass over memory. Knows rows, not whose
they are.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.compile_case import CompileCase
from services.engine.kernels.gpu.rounding import TRITON_DTYPES, is_interpreting, round_to
from services.engine.kernels.reference import GELU_CUBE, GELU_SCALE

Activation = Literal["silu", "gelu"]
_GELU_CUBE = tl.constexpr(GELU_CUBE)
_GELU_SCALE = tl.constexpr(GELU_SCALE)
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) of fp32 x; 0 for large negative x, where exp(-x) is infinite."""
    return x / (tl.exp(-x) + 1.0)


@triton.jit
def gelu(x):
    """x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))) of fp32 x: 0.5 x (1 + tanh(..)), with exp alone."""
    return x / (tl.exp((x * x * x * _GELU_CUBE + x) * _GELU_SCALE) + 1.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu or gelu of fp32 x."""
    if ACTIVATION == "gelu":
        return gelu(x)
    else:
        return silu(x)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    stride_gate_up_n,
    width,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    source = gate_up_ptr + row * stride_gate_up_n + columns
    gate = tl.load(source, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=is_inside, other=0.0).to(tl.float32)
    y = round_to(activate(gate, ACTIVATION) * up, DTYPE, INTERPRET)
    tl.store(out_ptr + row * width + columns, y, mask=is_inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [rows, 2 * width] -> [rows, width], computed in fp32, rounded once.

    Raises ValueError for another shape.
    """
    return activation_mul(gate_up, "silu")


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, by the tanh formula; else as `silu_mul`."""
    return activation_mul(gate_up, "gelu")


def activation_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """`silu_mul` or `gelu_mul`."""
    if gate_up.dim() != 2 or gate_up.shape[1] < 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up must be [rows, 2 * width] with rows that lie together, found {tuple(gate_up.shape)} "
            f"with strides {gate_up.stride()}"
        )
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = _block(width)
        _silu_mul_kernel[(rows, triton.cdiv(width, block))](
            gate_up,
            out,
            gate_up.stride(0),
            width,
            ACTIVATION=activation,
            DTYPE=TRITON_DTYPES[gate_up.dtype],
            BLOCK=block,
            INTERPRET=is_interpreting(),
            num_warps=_NUM_WARPS,
        )
    return out


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))


def compile_cases() -> list[CompileCase]:
    """The widths of models of today, and an odd one."""
    activations: tuple[Activation, ...] = ("silu", "gelu")
    return [
        CompileCase(
            name=f"{activation}_mul/width{width}",
            kernel=_silu_mul_kernel,
            signature={
                "gate_up_ptr": "*bf16",
                "out_ptr": "*bf16",
                "stride_gate_up_n": "i32",
                "width": "i32",
            },
            constexprs={
                "ACTIVATION": activation,
                "DTYPE": tl.bfloat16,
                "BLOCK": _block(width),
                "INTERPRET": False,
            },
            num_warps=_NUM_WARPS,
            num_stages=3,
            unaligned=frozenset(() if width % 16 == 0 else ("stride_gate_up_n", "width")),
        )
        for activation in activations
        for width in (63, 14336)
    ]
