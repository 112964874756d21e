"""4-bit linears for few rows on x86: torch's packed int4 product in bf16, with a dequantising path for many
rows.

One copy of the weight, in the packed operator's own layout, serves both: this module knows how that layout
lies on AVX-512 and AVX2, proves it on the weight at hand, and declines when it does not hold. It is never
stored on disk. Does not know which row count is many: `crossover_rows` is set from outside, after a
measurement.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from services.engine.kernels.numerics import Numerics
from services.engine.kernels.scratch import Scratch

_GROUPS = (32, 64, 128, 256)
_BLOCK_WIDTHS = (64, 32)
"""Outputs that lie together in the packed layout: AVX-512, AVX2."""


def is_supported(in_features: int, out_features: int, group_size: int, numerics: Numerics) -> bool:
    """Whether the packed product is fast here and takes this shape."""
    return (
        numerics.dtype == torch.bfloat16
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")
        and group_size in _GROUPS
        and out_features % _BLOCK_WIDTHS[0] == 0
        and in_features % 2 == 0
    )


class Int4PackLinear:
    """A 4-bit linear in bf16: the packed product below `crossover_rows` rows, dequantise and matmul after.

    The operator computes (q - 8) * s + zero, so its zero term is (8 - z) * s; both are rounded to bf16, which
    the dequantising path avoids by keeping fp16-exact scales and integer zeros beside (0.04 bytes a weight at
    group 128).
    """

    path = "int4pack"

    def __init__(
        self,
        values: Tensor,
        zeros: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        numerics: Numerics,
        scratch: Scratch,
    ) -> None:
        """values uint8 [in, out], zeros uint8 and scales [in / group, out]. ValueError: unknown layout."""
        self.in_features, self.out_features = values.shape
        self.num_groups = zeros.shape[0]
        self.group_size = self.in_features // self.num_groups
        self.crossover_rows: int | None = None
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.t().int().contiguous(), 1)
        wide = scales.float()
        zero_term = (8 - zeros.float()) * wide
        self.scales_and_zeros = torch.stack((wide, zero_term), -1).to(torch.bfloat16).contiguous()
        self._block = self._find_layout(values)
        self.zeros = self._by_block(zeros.to(torch.int8))
        self.scales = self._by_block(wide)
        self.bias = None if bias is None else bias.to(numerics.dtype)
        tensors = (self.packed, self.scales_and_zeros, self.zeros, self.scales)
        self.num_bytes = sum(tensor.nbytes for tensor in tensors)
        self._scratch = scratch

    def __call__(self, x: Tensor) -> Tensor:
        if self.crossover_rows is not None and x.shape[0] >= self.crossover_rows:
            y = torch.mm(x, self.dequantize())
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, self.packed, self.group_size, self.scales_and_zeros
            )
        return y if self.bias is None else y.add_(self.bias)

    def dequantize(self) -> Tensor:
        """The weight, bf16 [in, out], rounded once. Valid until the next call of any linear."""
        num_blocks = self.out_features // self._block
        nibbles = self._unpack(self._block).view(num_blocks, self.num_groups, self.group_size, self._block)
        shifted = nibbles.view(torch.int8).sub_(self.zeros)
        wide = (
            self._scratch.take("weight", tuple(shifted.shape), torch.float32).copy_(shifted).mul_(self.scales)
        )
        weight = self._scratch.take("weight", (self.in_features, self.out_features), torch.bfloat16)
        blocks = weight.view(self.in_features, num_blocks, self._block).transpose(0, 1)
        blocks.copy_(wide.view(num_blocks, self.in_features, self._block))
        return weight

    def _unpack(self, block: int) -> Tensor:
        """uint8 [blocks, in, block]: low nibbles are a block's first half of outputs, high ones its
        second.
        """
        half = block // 2
        packed = self.packed.view(self.out_features // block, self.in_features, half)
        nibbles = self._scratch.take("nibbles", (*packed.shape[:2], block), torch.uint8)
        torch.bitwise_and(packed, 15, out=nibbles[..., :half])
        torch.bitwise_right_shift(packed, 4, out=nibbles[..., half:])
        return nibbles

    def _find_layout(self, values: Tensor) -> int:
        for block in _BLOCK_WIDTHS:
            expected = values.view(self.in_features, -1, block).transpose(0, 1)
            if torch.equal(self._unpack_fresh(block), expected):
                return block
        raise ValueError("the packed int4 layout of this torch and CPU is not known")

    def _unpack_fresh(self, block: int) -> Tensor:
        packed = self.packed.view(self.out_features // block, self.in_features, block // 2)
        return torch.cat((packed & 15, packed >> 4), -1)

    def _by_block(self, per_group: Tensor) -> Tensor:
        """[groups, out] -> [blocks, groups, 1, block]."""
        return per_group.view(self.num_groups, -1, self._block).transpose(0, 1).unsqueeze(2).contiguous()
