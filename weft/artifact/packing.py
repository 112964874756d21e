"""The one definition of 4-bit layouts on disk: AutoAWQ's "gemm", which artifacts have by default, and the
others that are read or written.

A word of 32 bits holds eight consecutive numbers; nibble i (bits 4i to 4i+3) of word c holds number
8c + ORDER[i] in the gemm layout and 8c + i in every other. For a linear of `in` inputs and `out` outputs:

    gemm            qweight [in, out/8], qzeros [groups, out/8], scales [groups, out]
    gemv            qweight [out, in/8], qzeros [out, words], scales [out, 8 words]; padded behind the groups
    gptq, gptq_v2   qweight [in/8, out], qzeros [groups, out/8], scales [groups, out]; gptq stores zero - 1
    pack-quantized  weight_packed [out, in/8], weight_zero_point [out/8, groups], weight_scale [out, groups]

Words are int32. The weight is (q - zero) * scale in all of them; pack-quantized calls its numbers signed and
adds 8 before it packs them, which gives the same nibbles. This module does not know where the numbers come
from, nor what order a kernel would like.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""ORDER[i] is the output channel (within its eight) that nibble i of the gemm layout holds."""

SEQUENTIAL = (0, 1, 2, 3, 4, 5, 6, 7)
"""The order of all other layouts."""

SYMMETRIC_ZERO = 8
"""The zero point of a pack-quantized linear that stores none."""

_PER_WORD = len(ORDER)


def pack_int4(values: Tensor, order: tuple[int, ...] = ORDER) -> Tensor:
    """Pack integers 0..15, [rows, columns] with columns divisible by 8, into int32 [rows, columns/8]."""
    if values.dim() != 2 or values.shape[1] % _PER_WORD:
        raise ValueError(f"pack_int4: [rows, multiple of 8] expected, found {list(values.shape)}")
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"pack_int4: integers expected, found {values.dtype}")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) > 15):
        raise ValueError("pack_int4: values outside of 0..15")
    nibbles = values.to(torch.int64).unflatten(1, (-1, _PER_WORD))
    words = torch.zeros(nibbles.shape[:2], dtype=torch.int64, device=values.device)
    for position, channel in enumerate(order):
        words |= nibbles[..., channel] << (4 * position)
    # The eighth nibble reaches bit 31: bring the word into int32's range explicitly, casts of larger values
    # vary.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_int4(packed: Tensor, order: tuple[int, ...] = ORDER) -> Tensor:
    """Unpack int32 [rows, columns/8] into uint8 [rows, columns], the inverse of `pack_int4`."""
    if packed.dim() != 2 or packed.dtype != torch.int32:
        raise ValueError(
            f"unpack_int4: int32 [rows, words] expected, found {packed.dtype} {list(packed.shape)}"
        )
    values = torch.empty(*packed.shape, _PER_WORD, dtype=torch.uint8, device=packed.device)
    for position, channel in enumerate(order):
        values[..., channel] = ((packed >> (4 * position)) & 0xF).to(torch.uint8)
    return values.flatten(1)


def pack_rows(values: Tensor) -> Tensor:
    """Pack integers 0..15, [rows, columns] with rows divisible by 8, along the rows: int32 [rows/8,
    columns].
    """
    return pack_int4(values.T, SEQUENTIAL).T.contiguous()


def unpack_rows(packed: Tensor) -> Tensor:
    """Unpack int32 [rows/8, columns] into uint8 [rows, columns], the inverse of `pack_rows`."""
    return unpack_int4(packed.T, SEQUENTIAL).T


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """The fp32 weight [in, out] that the three tensors of the gemm layout mean: (q - zero) * scale, a group
    of rows per scale.
    """
    values, zeros = unpack_int4(qweight), unpack_int4(qzeros)
    if (
        zeros.shape != scales.shape
        or values.shape[1] != zeros.shape[1]
        or values.shape[0] % max(zeros.shape[0], 1)
    ):
        raise ValueError(
            f"dequantize: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, "
            f"scales {list(scales.shape)} disagree"
        )
    grouped = values.unflatten(0, (zeros.shape[0], -1)).float()
    return ((grouped - zeros.float().unsqueeze(1)) * scales.float().unsqueeze(1)).flatten(0, 1)
