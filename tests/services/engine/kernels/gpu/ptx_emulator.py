"""What a device makes of the kernels' inline assembly, for Triton's interpreter, which has none.

Each instruction does what the PTX manual says of it, on whole arrays. Only those that the kernels name are
known: another one is an error, and so is an operand whose register class does not fit its type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import TensorHandle

_CLASSES = {"r": (4, "iu"), "f": (4, "f"), "h": (2, "iuf")}
"""Bytes, and numpy's kinds, of what a register class holds."""


@dataclass(frozen=True)
class _Call:
    result: TensorHandle

    def get_result(self, index: int) -> TensorHandle:
        assert index == 0
        return self.result


def create_inline_asm(
    self: Any, asm: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int
) -> _Call:
    """In place of the interpreter's method of this name, which raises."""
    output, *inputs = constraints.split(",")
    assert pack == 1
    assert is_pure
    assert output.startswith("=")
    assert len(inputs) == len(values)
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    registers: dict[str, np.ndarray] = {}
    for index, (value, letter) in enumerate(zip(values, inputs, strict=True), 1):
        size, kinds = _CLASSES[letter]
        assert value.data.dtype.itemsize == size
        assert value.data.dtype.kind in kinds
        bits = np.ascontiguousarray(np.broadcast_to(value.data, shape))
        registers[f"${index}"] = bits.view(np.uint16 if size == 2 else np.uint32)
    for statement in asm.strip().strip("{}").split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            opcode, rest = statement.strip().split(maxsplit=1)
            _execute(opcode, rest, registers)
    dtype = types[0].scalar if hasattr(types[0], "scalar") else types[0]
    like = values[0].data.dtype if dtype == values[0].dtype.scalar else np.dtype(_NUMPY[str(dtype)])
    return _Call(TensorHandle(registers["$0"].view(like), dtype))


_NUMPY = {"int32": np.int32, "fp32": np.float32}


def _execute(opcode: str, operands: str, registers: dict[str, np.ndarray]) -> None:
    if unpacked := re.fullmatch(r"\{\s*(\w+),\s*(\w+)\s*\},\s*(\$\d)", operands):
        assert opcode == "mov.b32"
        low, high, source = unpacked.groups()
        registers[low], registers[high] = _halves(registers[source])
        return
    target, *names = [name.strip() for name in operands.split(",")]
    registers[target] = _OPCODES[opcode](*(_operand(name, registers) for name in names))


def _operand(name: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    return registers[name] if name in registers else np.uint32(int(name, 0))


def _halves(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (word & 0xFFFF).astype(np.uint16), (word >> 16).astype(np.uint16)


def _word(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i is that of b:a which nibble i of the selector names; a nibble's top bit would spread a sign."""
    assert not int(selector) & 0x8888
    both = a.astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    result = np.zeros(both.shape, np.uint64)
    for place in range(4):
        index = int(selector) >> (4 * place) & 7
        result |= (both >> np.uint64(8 * index) & np.uint64(0xFF)) << np.uint64(8 * place)
    return result.astype(np.uint32)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """A bit of the result is the table's bit number 4 a + 2 b + c."""
    result = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _rounded(wide: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 -> the bits of a 16-bit float, to the nearest (exact in float32 before, for what is tested)."""
    assert (wide.astype(np.float32) == wide).all()
    return torch.from_numpy(wide).to(torch.float32).to(dtype).view(torch.int16).numpy().view(np.uint16)


def _wide(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    flat = torch.from_numpy(np.ascontiguousarray(np.atleast_1d(bits)).view(np.int16))
    return flat.view(dtype).double().numpy().reshape(np.shape(bits))


def _fma_pairs(dtype: torch.dtype) -> Any:
    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        parts = zip(_halves(a), _halves(b), _halves(c), strict=True)
        return _word(
            *(_rounded(_wide(x, dtype) * _wide(y, dtype) + _wide(z, dtype), dtype) for x, y, z in parts)
        )

    return fma


def _bfloat16_pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The first operand goes to the high half."""
    return _word(
        *(_rounded(part.view(np.float32).astype(np.float64), torch.bfloat16) for part in (low, high))
    )


def _float16_pair(pair: np.ndarray) -> np.ndarray:
    """The low byte goes to the low half. The NaN of any sign is 0x7FFF."""
    codes = np.stack(((pair & 0xFF).astype(np.uint8), (pair >> 8).astype(np.uint8)))
    halves = (
        torch.from_numpy(codes).view(torch.float8_e4m3fn).half().view(torch.int16).numpy().view(np.uint16)
    )
    return _word(*np.where((codes & 0x7F) == 0x7F, np.uint16(0x7FFF), halves))


_OPCODES = {
    "mov.b16": lambda a: a,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "fma.rn.bf16x2": _fma_pairs(torch.bfloat16),
    "fma.rn.f16x2": _fma_pairs(torch.float16),
    "cvt.rn.bf16x2.f32": _bfloat16_pair,
    "cvt.rn.f16x2.e4m3x2": _float16_pair,
    "lg2.approx.ftz.f32": lambda a: np.log2(a.view(np.float32)).view(np.uint32),
}
