"""How a 4-bit weight lies in GPU memory: words in the order in which one thread's registers want them.

The matrix product takes the weight from registers, as the left operand of the tensor core. Which element of
an operand a thread holds is fixed by the hardware; so the weight is stored such that 16 bytes read by thread
t are exactly the elements thread t must hold, and nothing is exchanged between threads. Torch only; knows no
kernel and no launch.

A tile is 64 outputs by 64 inputs in 512 words, four words to each of 128 threads. With the bits of an output
n and an input k numbered from the lowest, and `j` bits 4-5 of k:

    word index  = n5 n4 | n2 n1 n0 | k2 k1 | k3 n3         (warp, lane, lane, register)
    nibble      = bits 4j of the low half-word for even k, of the high one for odd k

A half-word's lowest nibble is then the mantissa of one 16-bit float after a single AND/OR, and a shift by 4
brings up the next sixteen inputs. Two tiles (n6) make a block of 128 outputs by 64 inputs; the blocks of 128
outputs follow one another along the inputs, so a thread block streams one contiguous range.

Outputs are padded to 128 and inputs to 128 (two blocks); a padded scale is 0.

Scale and zero point share a word, its params: the float -(128 + z) or -(1024 + z) in the low half, in the
16-bit type of the activations, and the scale as fp16 in the high half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_OUTPUTS = 128
"""Outputs of one block of words; the packed weight holds a multiple of it."""
TILE_INPUTS = 64
"""Inputs of one block of words."""
INPUT_MULTIPLE = 128
"""The packed weight holds a multiple of this many inputs."""
SPANS = (128, 64, 32, 16)
"""Numbers of inputs that one scale of a supported weight may cover."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One 4-bit weight, repacked.

    Attributes:
        words: int32 [padded_outputs / 128, padded_inputs / 64, 1024].
        params: int32 [padded_outputs / 128, rows of params, 128, 128 / span]. With a span of 128 or none
            there is a row of params for each group, else one for each 128 inputs.
        in_features, out_features: without padding.
        group_size: inputs per scale.
        span: the largest number of SPANS that divides the group; None where none does, and then only
            `w4a16_dequantize` can read the weight.
        dtype: of the activations it is packed for. float32 is packed as bfloat16 is.
        is_interleaved: whether outputs i and i + out_features / 2 (gate and up) lie 8 rows apart.
    """

    words: Tensor
    params: Tensor
    in_features: int
    out_features: int
    group_size: int
    span: int | None
    dtype: torch.dtype
    is_interleaved: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes held on the device."""
        return self.words.nbytes + self.params.nbytes

    @property
    def padded_inputs(self) -> int:
        """Inputs with padding."""
        return self.words.shape[1] * TILE_INPUTS

    @property
    def padded_outputs(self) -> int:
        """Outputs with padding."""
        return self.words.shape[0] * TILE_OUTPUTS

    @property
    def group_stride(self) -> int:
        """Inputs from one scale to the next; a single scale covers the padding as well."""
        return self.padded_inputs if self.group_size == self.in_features else self.group_size


def pack(
    values: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype, *, is_interleaved: bool = False
) -> PackedWeight:
    """Repack values uint8 [in, out] 0..15, zeros uint8 and scales [in / group, out] for activations `dtype`.

    `is_interleaved` takes the first half of the outputs as gate, the second as up. ValueError if the shapes
    do not fit together, or if a scale has no finite, non-zero fp16 number near it (zero itself is allowed).
    """
    in_features, out_features = values.shape
    num_groups = zeros.shape[0]
    group_size = in_features // num_groups
    if group_size * num_groups != in_features or scales.shape != zeros.shape:
        raise ValueError(
            f"values {tuple(values.shape)}, zeros {tuple(zeros.shape)} and scales {tuple(scales.shape)} "
            "do not describe equal groups of inputs"
        )
    if zeros.shape[1] != out_features or (is_interleaved and out_features % 2):
        raise ValueError(f"zeros {tuple(zeros.shape)} do not fit {out_features} outputs")
    inputs = _round_up(in_features, INPUT_MULTIPLE)
    stride = inputs if num_groups == 1 else group_size
    span = next((span for span in SPANS if stride % span == 0), None)
    words = _to_words(_arrange(values, inputs, is_interleaved))
    params = _arrange(_params(zeros, scales, dtype), -(-inputs // stride), is_interleaved)
    per_row = INPUT_MULTIPLE // (span or INPUT_MULTIPLE)
    if per_row > 1:
        starts = torch.arange(0, inputs, INPUT_MULTIPLE // per_row, device=params.device)
        params = params[starts // stride]
    params = params.unflatten(0, (-1, per_row)).unflatten(2, (-1, TILE_OUTPUTS)).permute(2, 0, 3, 1)
    return PackedWeight(
        words, params.contiguous(), in_features, out_features, group_size, span, dtype, is_interleaved
    )


def unpack(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """(values uint8 [in, out], zeros uint8 and scales fp16 [in / group, out]): the inverse of `pack`."""
    params = packed.params.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
    per_row = packed.params.shape[3]
    if per_row > 1:
        starts = torch.arange(0, packed.in_features, packed.group_size, device=params.device)
        params = params[starts // (INPUT_MULTIPLE // per_row)]
    num_groups = packed.in_features // packed.group_size
    params = _restore(params, num_groups, packed.out_features, packed.is_interleaved)
    zeros = (params & 15).to(torch.uint8)
    scales = (params >> 16).to(torch.int16).view(torch.float16)
    columns = _from_words(packed.words)
    values = _restore(columns, packed.in_features, packed.out_features, packed.is_interleaved)
    return values, zeros, scales


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _params(zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int32: the fp16 scale above the 16-bit float -(magic + zero point)."""
    half = scales.to(torch.float16)
    if not bool(torch.isfinite(half).all()) or bool(((half == 0) & (scales != 0)).any()):
        raise ValueError("a scale is outside the range of fp16")
    magic = 0xE400 if dtype == torch.float16 else 0xC300
    return (half.view(torch.int16).to(torch.int32) << 16) | zeros.to(torch.int32) | magic


def _arrange(columns: Tensor, rows: int, is_interleaved: bool) -> Tensor:
    """[n, out] -> zero-padded [rows, padded outputs], in packed order of outputs."""
    parts = list(columns.chunk(2, 1)) if is_interleaved else [columns]
    width = _round_up(parts[0].shape[1], TILE_OUTPUTS // len(parts))
    out = columns.new_zeros((rows, width // 8, len(parts), 8))
    for index, part in enumerate(parts):
        padded = columns.new_zeros((columns.shape[0], width))
        padded[:, : part.shape[1]] = part
        out[: columns.shape[0], :, index] = padded.view(columns.shape[0], -1, 8)
    return out.view(rows, -1)


def _restore(columns: Tensor, rows: int, out_features: int, is_interleaved: bool) -> Tensor:
    """The inverse of `_arrange`."""
    num_parts = 2 if is_interleaved else 1
    parts = columns[:rows].unflatten(1, (-1, num_parts, 8)).unbind(2)
    return torch.cat([part.flatten(1)[:, : out_features // num_parts] for part in parts], 1).contiguous()


def _to_words(values: Tensor) -> Tensor:
    """uint8 [inputs, outputs] -> int32 [outputs / 128, inputs / 64, 1024]."""
    inputs, outputs = values.shape
    blocks, tiles = inputs // TILE_INPUTS, outputs // TILE_OUTPUTS
    # k = block, j1, j0, k3, k2-1, k0;  n = tile, n6, n5-4, n3, n2-0
    bits = values.view(blocks, 2, 2, 2, 4, 2, tiles, 2, 4, 2, 8)
    # tile, block, n6, n5-4, n2-0, k2-1, k3, n3, k0, j1, j0: the last three are the nibbles of a word
    ordered = bits.permute(6, 0, 7, 8, 10, 4, 3, 9, 5, 1, 2)
    packed = ordered[..., 0] | (ordered[..., 1] << 4)
    return packed.flatten(-2).contiguous().view(torch.int32).view(tiles, blocks, -1)


def _from_words(words: Tensor) -> Tensor:
    """The inverse of `_to_words`."""
    tiles, blocks, _ = words.shape
    packed = words.contiguous().view(torch.uint8).view(tiles, blocks, 2, 4, 8, 4, 2, 2, 2, 2)
    nibbles = torch.stack((packed & 15, packed >> 4), -1)
    values = nibbles.permute(1, 9, 10, 6, 5, 8, 0, 2, 3, 7, 4)
    return values.reshape(blocks * TILE_INPUTS, tiles * TILE_OUTPUTS)
